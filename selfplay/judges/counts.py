"""What the verifier counts in a text: words, sentences, list items, and the last number. English is what they know:
words are counted between white space, so a script without spaces counts as a few long words.
"""

import re

LIST_MARKER = re.compile(r"^[ \t]*(?:[-*•+\u2013]|\d{1,3}[.)])[ \t]+(?=\S)", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
SENTENCE_END = re.compile(r"([.!?…]+)([\"\'\u201d\u2019)\]*_]*)(?=\s|$)")
# A full stop after these never ends a sentence; after those it does only where a capital follows.
ALWAYS_GO_ON = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "mt", "vs", "cf", "fig", "e.g", "i.e", "approx", "ca"])
MAY_GO_ON = frozenset(["etc", "inc", "ltd", "co", "jr", "sr", "no", "dept", "est", "al"])
DOTTED = re.compile(r"(?:[a-z]\.)+[a-z]")


def count_words(text: str) -> int:
    """Pieces between white space or long dashes that hold a letter or a digit; a list marker is no word."""
    return sum(any(c.isalnum() for c in piece) for piece in re.split(r"\s+|—", LIST_MARKER.sub("", text)))


def count_sentences(text: str) -> int:
    """Sentences, where every list item, heading and unfinished line counts as at least one.

    3.5, example.com, "e.g." and "Dr." end no sentence. A line that starts in lower case goes on with the line before.
    """
    blocks: list[str] = []
    for raw in text.splitlines():
        line = LIST_MARKER.sub("", raw).strip()
        if blocks and line[:1].islower() and line == raw.strip() and blocks[-1] and blocks[-1][-1] not in ".!?…":
            blocks[-1] += " " + line
        else:
            blocks.append(line)
    return sum(_sentences_of_block(block) for block in blocks)


def _sentences_of_block(block: str) -> int:
    count, start = 0, 0
    for end in SENTENCE_END.finditer(block):
        has_words = any(c.isalnum() for c in block[start : end.start()])
        if has_words and _ends_sentence(block, end):
            count, start = count + 1, end.end()
    return count + any(c.isalnum() for c in block[start:])


def _ends_sentence(block: str, end: re.Match[str]) -> bool:
    rest = block[end.end() :].lstrip(" \t\"'\u201c\u2018([*_")
    if not rest:
        return True
    if end[1] != ".":
        # "Why?" she asked; well... maybe
        return not (rest[0].islower() and (end[2] or end[1][0] in ".…"))
    word = re.split(r"[\s(\[\"'\u201c\u2018*_]", block[: end.start()])[-1]
    if word.lower() in ALWAYS_GO_ON or (len(word) == 1 and word.isupper() and word != "I"):
        return False
    if word.lower() in MAY_GO_ON or DOTTED.fullmatch(word.lower()):
        return not (rest[0].islower() or rest[0].isdigit())
    return True


def last_number(text: str) -> float | None:
    """The first number after the last "####" where there is one, else the last number of the text; None without any.
    Commas between thousands are read, so "1,000" is 1000.
    """
    _, mark, marked = text.rpartition("####")
    after = NUMBER.search(marked) if mark else None
    found = after[0] if after else next(reversed(NUMBER.findall(text)), None)
    return None if found is None else float(found.replace(",", "").replace("\u2212", "-"))
