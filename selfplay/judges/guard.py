"""What stands between the client of an endpoint and the network: what is sent, to which addresses, and how much is read.

An address is checked before each request; a name that changes its address between the check and the connection is not
caught.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping

import httpx2

from selfplay.errors import SecurityError
from selfplay.recipe_judges import is_link_local

MAX_BODY = 4 * 2**20  # bytes; a verdict has a few thousand
# The client adds more, and what environment variables tell it to: organisations, projects, any header.
SENT = ("host", "connection", "user-agent", "accept", "content-type", "content-length", "transfer-encoding")


class BodyError(Exception):
    """A body that is not read to its end, and the status and headers that it came with."""

    def __init__(self, reason: str, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers


class _Capped(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, status: int, headers: Mapping[str, str]) -> None:
        self._stream = stream
        self._status = status
        self._headers = headers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_BODY:
                raise BodyError(f"the server's body is larger than {MAX_BODY} bytes", self._status, self._headers)
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class Guard(httpx2.AsyncBaseTransport):
    """Sends the key and SENT alone, connects to no link-local address, reads no compressed body (a small one can unpack to any
    size), and no large one.
    """

    def __init__(self, key: str | None) -> None:
        self._key = key
        # Endpoint counts the calls; a limit here would let them wait within their timeout
        self._inner = httpx2.AsyncHTTPTransport(limits=httpx2.Limits())

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await check_host(request.url.host, request.url.port)
        headers = {name: request.headers[name] for name in SENT if name in request.headers}
        headers |= {"accept-encoding": "identity"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        # a request of its own: the client looks for notes to itself among the headers of the one that it made
        response = await self._inner.handle_async_request(
            httpx2.Request(
                request.method, request.url, headers=headers, stream=request.stream, extensions=request.extensions
            )
        )
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            await response.aclose()
            raise BodyError(
                "the server's body is compressed, which was not asked for", response.status_code, response.headers
            )
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=_Capped(response.stream, response.status_code, response.headers),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


async def check_host(host: str, port: int | None) -> None:
    """SecurityError where a host's name leads to a link-local address: clouds keep machine credentials there."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpx2.ConnectError(f"{host}: no address ({error})") from None
    for address in {str(sockaddr[0]) for *_, sockaddr in found}:
        if is_link_local(address):
            raise SecurityError(f"judge.base_url: {host} is the link-local address {address}, which is never asked.")
