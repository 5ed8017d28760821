"""How chat models spell the borders of turns and of thinking, and text in which none is left.

A server may read such a spelling as the token that it names, wherever it stands. It can't be asked which ones it knows, so
whatever looks like one gets a space behind its first character, in a template's own words too: a reader sees nearly the same
text, a tokenizer no token. chat.py, which knows its tokenizer, has no need of this.

A word alone in brackets or angles is ordinary text more often than a token ([INFO], [A], <b>). Such tokens are named one by
one; all others are known by their form.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from selfplay.types import Message

# What follows the first character.
_ANGLE = (
    r"[|\uff5c][^<>\n]*>",  # <|im_end|>, <|turn>; DeepSeek's with full-width bars
    r"[^\s<>]*[|\uff5c]>",  # <turn|>
    r"</?[A-Z_]+>>",  # <<SYS>>
    r"/?(?=[^\W_]*_)\w+>",  # <start_of_turn>, <tool_call>, <EOS_TOKEN>, <extra_id_0>
    r"/?seed:\w+>",
    r"unused\d+>",
    r"/?(?i:s|bos|eo[ahpst]|pad|unk|sep|cls|mask|sop|think)>",
)
_BRACKET = (
    r"/[A-Z]{2}[A-Z_]*\]",  # [/INST]
    r"[A-Z]{2,}_[A-Z_]*\d*\]",  # [TOOL_CALLS], [SYSTEM_PROMPT]
    r"(?:INST|IMG|ARGS|THINK|PREFIX|SUFFIX|MIDDLE|AUDIO|TRANSCRIBE|PAD|UNK|BOS|EOS|SEP|CLS|[gs]?MASK|control_\d+)\]",
    r"\|[^\[\]\n]*\|\]",  # [|user|]
    r"[a-z]~\[",  # [e~[
)
_CLOSED = (r"~!?[a-z][\[\]]", r"![a-z]~\[")  # ]~b], ]~!b[, ]!p~[
_BORDER = re.compile(
    "|".join(f"{first}(?={'|'.join(rest)})" for first, rest in (("<", _ANGLE), (r"\[", _BRACKET), (r"\]", _CLOSED)))
)


def without_borders(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with a space in every spelling of a border."""
    return tuple(replace(m, content=_BORDER.sub(lambda found: found[0] + " ", m.content)) for m in messages)
