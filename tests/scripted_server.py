"""A chat endpoint on loopback that answers as a script says, well or badly. Raw sockets, for most faults are no HTTP.

with Server(lambda asked: says("Score: 3")) as server:
    ... server.url ...
"""

import contextlib
import gzip
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

TICK = 0.01  # seconds between the bytes of a slow body


@dataclass(frozen=True)
class Asked:
    """One request: its place in arrival order, path, headers in lower case, JSON body."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """The last turn."""
        return str(self.body["messages"][-1]["content"])


Act = Callable[[socket.socket, threading.Event], None]


def http(status: int, body: bytes = b"", /, **headers: object) -> Act:
    """A whole HTTP reply; header names with _ for -."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    data = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    return lambda connection, stopped: connection.sendall(data)


def says(text: str | None, *, finish_reason: str = "stop", tokens: tuple[int, int] = (10, 2)) -> Act:
    """A completion."""
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return http(200, json.dumps({"choices": [choice], "usage": usage}).encode(), Content_Type="application/json")


def reset(connection: socket.socket, stopped: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half(connection: socket.socket, stopped: threading.Event) -> None:
    connection.sendall(b'HTTP/1.1 200 X\r\nContent-Length: 999\r\nConnection: close\r\n\r\n{"choices": [')


def drip(connection: socket.socket, stopped: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 X\r\nContent-Length: 99999\r\n\r\n")
    while not stopped.wait(TICK):
        connection.sendall(b" ")


def endless(connection: socket.socket, stopped: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n")
    while not stopped.is_set():
        connection.sendall(b" " * 65536)


def silent(connection: socket.socket, stopped: threading.Event) -> None:
    stopped.wait()


BOMB = http(200, gzip.compress(b" " * 2**24), Content_Encoding="gzip", Content_Type="application/json")


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Server)
        start = self.rfile.readline().split()
        if len(start) < 2:
            return
        headers = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(self.rfile.read(int(headers.get("content-length", 0))) or b"{}")
        act = self.server.record(start[1].decode(), headers, body)
        with contextlib.suppress(OSError):  # the client has hung up
            act(self.connection, self.server.stopped)
        self.server.leave()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()


class Server(socketserver.ThreadingTCPServer):
    """Serves `script(asked)` in a `with` block. `asked` are all requests so far, `peak` the most at one time."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 64

    def __init__(self, script: Callable[[Asked], Act]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.asked: list[Asked] = []
        self.peak = 0
        self.stopped = threading.Event()
        self._now = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def record(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Act:
        with self._lock:
            asked = Asked(len(self.asked), path, headers, body)
            self.asked.append(asked)
            self._now += 1
            self.peak = max(self.peak, self._now)
            return self.script(asked)

    def leave(self) -> None:
        with self._lock:
            self._now -= 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
