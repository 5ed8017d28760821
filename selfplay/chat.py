"""Messages to token ids and back: the only place that tokenizes.

Generation and training share these ids, so a template, BOS or end-token mismatch between them can't arise. Text from
data or from a model never becomes a special token: where a message spells one, it is encoded as ordinary text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from selfplay.collection import collection_paused
from selfplay.errors import DataError
from selfplay.recipe_paths import names_template_file
from selfplay.types import Completion, FinishReason, Message, Prompt

# Private-use characters: OPEN, a number and CLOSE stand in for a special token's spelling while the template renders.
_OPEN, _CLOSE = "\ue000", "\ue001"
# What an added token is called that is markup; others may be words, or runs of spaces. The look-ahead finds markup in markup.
_MARKUP = re.compile(r"(?=(<[^\s<>]+>|\[[^\s\[\]]+\]))")


class Chat:
    """A tokenizer with its chat template. `stop_token_ids` end a completion; the first is the one gold answers end with
    where the template itself ends no turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_token_ids: Sequence[int],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_tags: tuple[str, str] | None = None,
        key: str = "chat",
    ) -> None:
        """`key` is the recipe's section that these come from, for errors."""
        if not tokenizer.chat_template:
            raise DataError(
                f"{key}.chat_template: the tokenizer of {tokenizer.name_or_path} has no chat template. Give one in the recipe, "
                "as text or as a file beside it"
            )
        if not stop_token_ids:
            raise DataError(f"{tokenizer.name_or_path}: no end token is known, so no completion could ever end")
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(dict.fromkeys(stop_token_ids))
        self.template_kwargs = dict(chat_template_kwargs or {})
        self.reasoning_tags = reasoning_tags
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)}
        self._special = sorted(special, key=len, reverse=True)
        self._markup = {
            t.content: id for id, t in added.items() if (m := _MARKUP.match(t.content)) and m[1] == t.content
        }
        self._markup_ids = frozenset(self._markup.values())
        self._opening = self.render((Message("user", "hello"),), add_generation_prompt=True).rstrip()
        self._opens_thinking = reasoning_tags is not None and self.opens_with(reasoning_tags[0])

    @classmethod
    def load(
        cls,
        model: str,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_tags: tuple[str, str] | None = None,
        key: str = "chat",
    ) -> "Chat":
        """The chat of a model folder or hub id. DataError where it has no tokenizer or no template; `key` as above."""
        with collection_paused():
            from transformers import AutoTokenizer, GenerationConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise DataError(f"{model}: no tokenizer could be loaded ({error})") from error
        if chat_template is not None:
            tokenizer.chat_template = template_text(chat_template, key=f"{key}.chat_template")
        stops: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        try:
            declared = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:  # a model without a generation_config.json
            declared = None
        stops += [declared] if isinstance(declared, int) else list(declared or [])
        return cls(
            tokenizer,
            stop_token_ids=stops,
            chat_template_kwargs=chat_template_kwargs,
            reasoning_tags=reasoning_tags,
            key=key,
        )

    def opens_with(self, tag: str) -> bool:
        """Whether the generation prompt ends in `tag`, so that a completion begins behind it."""
        return self._opening.endswith(tag)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
    ) -> str:
        """The template's text. DataError where the template refuses these messages."""
        import jinja2

        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(m.role for m in messages)
            raise DataError(f"the chat template refuses these messages (roles: {roles}): {error}") from error
        return cast(str, text)

    def encode_messages(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        untrusted: bool = False,
    ) -> tuple[int, ...]:
        """Token ids of the rendered messages, with exactly the special tokens that the template itself writes.

        Tokenizers also add tokens that are not special, and text may mean them: runs of spaces, or markup such as </think>,
        which a policy must learn from gold answers as the one token that it is. What is `untrusted`, as all that a judge
        reads, spells no markup either.
        """
        texts = [*(m.content for m in messages), *_strings(tools)]
        spelled = [s for s in self._special if any(s in text for text in texts)]
        if untrusted:  # there may be thousands of such tokens, so the text is searched once
            marks = self._markup.keys() & {found[1] for text in texts for found in _MARKUP.finditer(text)}
            spelled = sorted({*spelled, *marks}, key=len, reverse=True)
        if not spelled:
            text = self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
            return self._encode(text)
        start = _OPEN
        while any(start in text for text in texts):  # a message may hold these characters itself
            start += _OPEN

        def hide(text: str) -> str:
            for index, special in enumerate(spelled):
                text = text.replace(special, f"{start}{index}{_CLOSE}")
            return text

        hidden = [Message(m.role, hide(m.content)) for m in messages]
        text = self.render(hidden, tools=_mapped(tools, hide), add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for place, part in enumerate(re.split(f"{start}([0-9]+){_CLOSE}", text)):  # odd places are the numbers
            ids += self._spell(spelled[int(part)]) if place % 2 else self._encode(part)
        return tuple(ids)

    def _spell(self, token: str) -> tuple[int, ...]:
        """Token ids of an added token's text, in which it is no token. Tokenizers switch off special ones alone, so of other
        markup the first character is encoded by itself.
        """
        first, ids = tuple[int, ...](), self._encode(token, as_text=True)
        if token not in self._markup:  # it may be an ordinary word, which stays one
            return ids
        while not self._markup_ids.isdisjoint(ids):
            first += self._encode(token[0], as_text=True)
            token = token[1:]
            ids = self._encode(token, as_text=True)
        return first + ids

    def _encode(self, text: str, *, as_text: bool = False) -> tuple[int, ...]:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text, return_attention_mask=False)
        return tuple(ids["input_ids"])

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a text by itself, in which nothing is a special token."""
        return self._encode(text, as_text=True)

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids up to and including the generation prompt."""
        return self.encode_messages(prompt.messages, tools=prompt.tools)

    def encode_completion(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Token ids that `text` has as the completion of `prompt`, ending at the first stop token: a template's newline
        after it is cut off, else training on it would teach the newline.

        DataError where the rendered prompt is no token prefix of the rendered conversation.
        """
        prompt_ids = self.encode_prompt(prompt)
        turns = (*prompt.messages, Message("assistant", text))
        ids = self.encode_messages(turns, tools=prompt.tools, add_generation_prompt=False)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise DataError(
                f"prompt {prompt.id}: the rendered prompt is no token prefix of the rendered conversation, so this "
                "chat template can't be trained on text that the policy did not sample. Give another chat_template or "
                "chat_template_kwargs (templates that add an empty thinking block only to past turns do this)"
            )
        tail = ids[len(prompt_ids) :]
        end = next((n for n, i in enumerate(tail) if i in self.stop_token_ids), None)
        return (*tail, self.stop_token_ids[0]) if end is None else tail[: end + 1]

    def encode_gold(self, prompt: Prompt) -> Completion | None:
        """The prompt's gold answer as a completion; None where it has none."""
        if prompt.gold is None:
            return None
        return Completion(prompt.gold, self.encode_completion(prompt, prompt.gold), finish_reason="gold")

    def completion(
        self,
        token_ids: Sequence[int],
        logps: Sequence[float],
        finish_reason: FinishReason,
        stop_reason: int | str | None,
        stop: Sequence[str] = (),
    ) -> Completion:
        """A sampled completion with the text that judges see; the ids stay as they are."""
        text = self.decode(token_ids, keep=self.reasoning_tags or ())
        cuts = [text.index(s) for s in stop if s in text]
        text = text[: min(cuts)] if cuts else text
        text, reasoning = self._split_reasoning(text)
        return Completion(text.strip(), tuple(token_ids), tuple(logps), finish_reason, stop_reason, reasoning)

    def decode(self, token_ids: Sequence[int], *, keep: Sequence[str] = ()) -> str:
        """The text of token ids without special tokens, but with those that `keep` spells: some tokenizers call the tags
        around a model's thoughts special.
        """
        kept = [tag for tag in keep if tag in self._special]
        if kept:
            hidden = {*self.tokenizer.convert_tokens_to_ids([token for token in self._special if token not in kept])}
            token_ids = [id for id in token_ids if id not in hidden]
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=not kept, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def _split_reasoning(self, text: str) -> tuple[str, str | None]:
        """(what is shown, the thinking); unfinished thinking leaves an empty text, which no pair takes."""
        if self.reasoning_tags is None:
            return text, None
        opening, closing = self.reasoning_tags
        before, found, after = text.partition(closing)
        if found:
            return after, before.replace(opening, "", 1).strip()
        return ("", text) if self._opens_thinking or opening in text else (text, None)

    @property
    def template_digest_text(self) -> str:
        """What decides how messages become ids; part of a run's identity."""
        return json.dumps([self.tokenizer.chat_template, self.template_kwargs, self.reasoning_tags], sort_keys=True)


def template_text(chat_template: str, *, key: str = "chat.chat_template") -> str:
    """A template that is given as text, or as the name of a file. DataError, naming the recipe's key, where that file can't
    be read.
    """
    if not names_template_file(chat_template):
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{key}: {chat_template} is no template (it has no Jinja tag) and no file that can be read ({error})"
        ) from error


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *_strings(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text inside it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value
