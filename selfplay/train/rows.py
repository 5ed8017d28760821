"""What a job trains on: pairs, or demonstrations where no loss reads a rejected completion."""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selfplay.errors import DataError, NoPairsError
from selfplay.preferences import our_records
from selfplay.recipe_train import reads
from selfplay.records import Lazy, Records
from selfplay.train.settings import TrainJob
from selfplay.types import Demonstration, PreferencePair, TrainRow

HELD = 256  # rows that are kept for whoever asks for them again, as the parts of a step do
Numbers = npt.NDArray[Any]


class Rows(Lazy[TrainRow]):
    """Those records of a file that a job trains on, read when they are asked for: there may be too many to hold.

    `prompt_numbers` says which rows have equal prompt tokens: it counts prompts from 0 as they come.
    """

    def __init__(self, records: Records[Any], places: Numbers, prompt_numbers: Numbers, *, as_chosen: bool) -> None:
        self._records, self._places, self._as_chosen = records, places, as_chosen
        self.prompt_numbers = prompt_numbers
        self._held: dict[int, TrainRow] = {}

    def __len__(self) -> int:
        return len(self._places)

    def _item(self, place: int) -> TrainRow:
        if place not in self._held:
            if len(self._held) == HELD:
                self._held.clear()
            row = self._records[int(self._places[place])]
            self._held[place] = demonstration_of(row) if self._as_chosen else row
        return self._held[place]


def read_rows(job: TrainJob) -> tuple[Sequence[TrainRow], int]:
    """(rows to train on, rows left out for being over max_length).

    Where no loss reads a rejected completion (`loss_type: sft`) a pair becomes a demonstration of its chosen one, and the
    rejected one is never forwarded. A completion that is chosen in several pairs counts once for each, as it does in a list
    of losses with `sft`; it is forwarded once, since a pack holds it once. NoPairsError where no row is left.
    """
    path, limit, with_rejected = Path(job.pairs), job.settings.max_length, "rejected" in reads(job.settings.loss_type)
    kind = _kind(path, with_rejected=with_rejected)
    as_chosen = kind is PreferencePair and not with_rejected
    records: Records[Any] = Records(kind, [path])
    places, prompts = array("I"), array("Q")
    for place, record in enumerate(records):
        row = demonstration_of(record) if as_chosen else record
        if limit is None or _length(row) <= limit:
            places.append(place)
            prompts.append(_tokens_number(row.prompt_token_ids))
    if not places:
        raise NoPairsError(f"{path}: no pair to train on ({len(records)} read, the rest over max_length {limit})")
    rows = Rows(records, np.frombuffer(places, "u4"), _in_order(np.frombuffer(prompts, "u8")), as_chosen=as_chosen)
    return rows, len(records) - len(places)


def _kind(path: Path, *, with_rejected: bool) -> type[PreferencePair] | type[Demonstration]:
    if our_records(str(path)) is not Demonstration:
        return PreferencePair
    if with_rejected:
        raise DataError(
            f"{path}: demonstrations have no rejected completion, which this train.loss_type reads. Say loss_type: sft"
        )
    return Demonstration


def prompt_numbers(rows: Sequence[TrainRow]) -> Numbers:
    """Equal numbers for rows with equal prompt tokens, counted from 0 as prompts come."""
    if isinstance(rows, Rows):
        return rows.prompt_numbers
    return _in_order(np.array([_tokens_number(row.prompt_token_ids) for row in rows], "u8"))


def _tokens_number(tokens: Sequence[int]) -> int:
    """8 bytes for a prompt, which are others for another one."""
    return int.from_bytes(hashlib.blake2b(array("q", tokens).tobytes(), digest_size=8).digest(), "big")


def _in_order(found: Numbers) -> Numbers:
    """Numbers from 0 for values, the same for the same, as they come."""
    _, first, which = np.unique(found, return_index=True, return_inverse=True)
    number = np.empty(len(first), "u4")
    number[np.argsort(first)] = np.arange(len(first), dtype="u4")
    return number[which]


def demonstration_of(pair: PreferencePair) -> Demonstration:
    """The chosen completion of a pair."""
    return Demonstration(
        pair.prompt_id, pair.prompt, pair.chosen, pair.prompt_token_ids, pair.chosen_token_ids, pair.weight
    )


def _length(row: TrainRow) -> int:
    return len(row.prompt_token_ids) + max(map(len, row.completions))
