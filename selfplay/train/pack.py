"""Packs: rows of tokens in which the completions of a prompt share that prompt.

A row holds the prompt once, then every completion that its pairs use, for as many prompts as fit; a pack is one row, or
several where a row's length has a cap of its own. Position ids restart after the prompt for each completion, and a completion
sees its prompt and itself only.
Shapes: R rows (where prompts are not shared, one per sequence), T tokens of a row, S sequences, N completion tokens, B pairs.
What is said of pairs holds for demonstrations, which have a chosen completion only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from selfplay.types import TrainRow

Tokens = tuple[int, ...]
T = TypeVar("T")
NO_BRANCH = -1  # branch of prompt tokens: every completion of the prompt sees them
PADDING = -2  # segment of padding: nothing sees it


@dataclass(frozen=True, slots=True)
class Pack:
    """Tensors of one forward. `segment` numbers the prompts of a pack, `branch` its completions."""

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    segment_RT: Tensor
    branch_RT: Tensor
    predict_N: Tensor  # place in the flattened rows whose hidden state predicts the token
    target_N: Tensor
    sequence_N: Tensor  # which sequence the token belongs to
    num_sequences: int
    chosen_B: Tensor  # sequence of each pair's chosen completion
    rejected_B: Tensor | None  # None for demonstrations
    pair_B: tuple[int, ...]  # index of each pair in the round's list
    # of each prompt and its completions, row after row, the padding of a row like a prompt of its own; () in plain rows
    lengths: tuple[tuple[int, ...], ...]

    @property
    def shared(self) -> bool:
        """Whether completions share their prompt; else the rows are plain ones, padded on the right."""
        return bool(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens forwarded, padding included."""
        return self.input_ids_RT.numel()

    def sum_per_sequence(self, logps_N: Tensor) -> Tensor:
        """Summed logps, shape (S,)."""
        return torch.zeros(self.num_sequences, device=logps_N.device).index_add(0, self.sequence_N, logps_N)

    def lengths_S(self) -> Tensor:
        """Completion tokens of each sequence."""
        return torch.bincount(self.sequence_N, minlength=self.num_sequences)

    def to(self, device: torch.device) -> "Pack":
        """The same pack on a device."""
        values: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            values[name] = value.to(device) if isinstance(value, Tensor) else value
        return Pack(**values)


@dataclass(slots=True)
class _Shared:
    """One prompt in the making: its distinct completions and its pairs."""

    prompt: Tokens
    completions: list[Tokens] = field(default_factory=list)
    pairs: list[tuple[int, list[int]]] = field(default_factory=list)  # pair, its completions: chosen, rejected

    def missing(self, pair: TrainRow) -> list[Tokens]:
        return [tokens for tokens in dict.fromkeys(pair.completions) if tokens not in self.completions]

    def add(self, index: int, pair: TrainRow) -> None:
        self.completions += self.missing(pair)
        self.pairs.append((index, [self.completions.index(tokens) for tokens in pair.completions]))


def _num_tokens(groups: Sequence[_Shared], shared: bool, extra: Sequence[Tokens] = ()) -> int:
    """Tokens of a pack of these groups, with `extra` completions of the last one. Plain rows are padded to the longest."""
    more = [*[()] * (len(groups) - 1), extra]
    if shared:
        return sum(len(g.prompt) + sum(map(len, [*g.completions, *new])) for g, new in zip(groups, more, strict=True))
    rows = [len(g.prompt) + len(c) for g, new in zip(groups, more, strict=True) for c in (*g.completions, *new)]
    return len(rows) * max(rows)


def build_packs(
    pairs: Sequence[TrainRow],
    indices: Sequence[int],
    *,
    max_pack_tokens: int,
    shared: bool,
    max_pack_length: int | None = None,
) -> list[Pack]:
    """The packs of some pairs, first fit by falling size. No pair is split; one that is longer than a cap has a row, or a
    pack, of its own. `shared=False` gives plain padded rows, one per sequence, and then `max_pack_length` plays no part.
    """
    if not shared:
        groups = sorted(_groups(pairs, indices, max_pack_tokens, shared), key=lambda g: -_num_tokens([g], shared))
        bins = _first_fit(groups, lambda held: _num_tokens(held, shared) <= max_pack_tokens)
        return [_tensors([held], shared) for held in bins]
    longest = _longest(max_pack_tokens, max_pack_length)
    groups = sorted(_groups(pairs, indices, longest, shared), key=lambda g: -_num_tokens([g], shared))
    rows = _first_fit(groups, lambda held: _num_tokens(held, shared) <= longest)
    # two rows of a pack that is as long as its budget never fit beside each other
    packs = _first_fit(rows, lambda held: len(held) * max(_num_tokens(r, shared) for r in held) <= max_pack_tokens)
    return [_tensors(held, shared) for held in packs]


def _first_fit(items: Sequence[T], fits: Callable[[list[T]], bool]) -> list[list[T]]:
    """Each item in the first bin that it fits, else in a new one."""
    bins: list[list[T]] = []
    for item in items:
        place = next((held for held in bins if fits([*held, item])), None)
        if place is None:
            bins.append([item])
        else:
            place.append(item)
    return bins


def _longest(max_pack_tokens: int, max_pack_length: int | None) -> int:
    return min(max_pack_tokens, max_pack_length or max_pack_tokens)


def units(
    pairs: Sequence[TrainRow],
    indices: Sequence[int],
    *,
    max_pack_tokens: int,
    shared: bool,
    max_pack_length: int | None = None,
) -> list[tuple[int, list[int]]]:
    """(tokens, indices) of what `build_packs` never splits: the pairs of a prompt, or as many as fit the caps."""
    cap = _longest(max_pack_tokens, max_pack_length) if shared else max_pack_tokens
    groups = _groups(pairs, indices, cap, shared)
    return [(_num_tokens([group], shared), [index for index, _ in group.pairs]) for group in groups]


def _groups(pairs: Sequence[TrainRow], indices: Sequence[int], cap: int, shared: bool) -> list[_Shared]:
    done: list[_Shared] = []
    open_groups: dict[Tokens, _Shared] = {}
    for index in indices:
        pair = pairs[index]
        group = open_groups.setdefault(pair.prompt_token_ids, _Shared(pair.prompt_token_ids))
        if group.pairs and _num_tokens([group], shared, group.missing(pair)) > cap:
            done.append(group)
            group = open_groups[pair.prompt_token_ids] = _Shared(pair.prompt_token_ids)
        group.add(index, pair)
    return [*done, *open_groups.values()]


def _tensors(held: list[list[_Shared]], shared: bool) -> Pack:
    """The pack of what each of its rows holds; plain rows are one list."""
    rows: list[_Row] = []
    targets: list[tuple[int, int, int, int]] = []  # row, place, token, sequence
    pair_indices: list[int] = []
    sequences: list[list[int]] = []  # of each pair: chosen, rejected
    sequence = 0
    for segment, (starts_row, group) in enumerate((n == 0, g) for groups in held for n, g in enumerate(groups)):
        first = sequence
        if shared:
            if starts_row:
                rows.append(_Row())
            rows[-1].add(group.prompt, 0, segment, NO_BRANCH)
        for completion in group.completions:
            if not shared:
                rows.append(_Row())
                rows[-1].add(group.prompt, 0, segment, NO_BRANCH)
            row = rows[-1]
            start = len(row.ids)
            row.add(completion, len(group.prompt), segment, sequence)
            places = [row.prompt_end - 1, *range(start, start + len(completion) - 1)]
            targets += [(len(rows) - 1, p, t, sequence) for p, t in zip(places, completion, strict=True)]
            sequence += 1
        for index, completions in group.pairs:
            pair_indices.append(index)
            sequences.append([first + completion for completion in completions])
    width = max(len(row.ids) for row in rows)
    columns = [row.padded(width) for row in rows]
    place_N, token_N, sequence_N = (
        torch.tensor(c) for c in zip(*[(r * width + p, t, s) for r, p, t, s in targets], strict=True)
    )
    sides = [torch.tensor(side) for side in zip(*sequences, strict=True)]  # no pack mixes pairs and demonstrations
    input_ids, positions, segments, branches = (torch.tensor(column) for column in zip(*columns, strict=True))
    return Pack(
        input_ids_RT=input_ids,
        position_ids_RT=positions,
        segment_RT=segments,
        branch_RT=branches,
        predict_N=place_N,
        target_N=token_N,
        sequence_N=sequence_N,
        num_sequences=sequence,
        chosen_B=sides[0],
        rejected_B=sides[1] if len(sides) > 1 else None,
        pair_B=tuple(pair_indices),
        lengths=tuple(part for groups in held for part in _lengths(groups, width)) if shared else (),
    )


def _lengths(groups: list[_Shared], width: int) -> list[tuple[int, ...]]:
    """Of the prompts and completions of a row, and of its padding."""
    gap = width - _num_tokens(groups, True)
    return [*((len(g.prompt), *map(len, g.completions)) for g in groups), *([(gap,)] if gap else [])]


class _Row:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[int] = []
        self.branches: list[int] = []
        self.prompt_end = 0  # where the last prompt ends

    def add(self, tokens: Tokens, position: int, segment: int, branch: int) -> None:
        self.ids += tokens
        self.positions += range(position, position + len(tokens))
        self.segments += [segment] * len(tokens)
        self.branches += [branch] * len(tokens)
        if branch == NO_BRANCH:
            self.prompt_end = len(self.ids)

    def padded(self, width: int) -> tuple[list[int], list[int], list[int], list[int]]:
        # by length, never by id: the pad token is often the end token, which must be learnt
        gap = width - len(self.ids)
        return (
            self.ids + [0] * gap,
            self.positions + [0] * gap,
            self.segments + [PADDING] * gap,
            self.branches + [PADDING] * gap,
        )
