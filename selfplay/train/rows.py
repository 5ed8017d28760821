"""What a job trains on: pairs, or demonstrations where no loss reads a rejected completion."""

from collections.abc import Sequence
from pathlib import Path

from selfplay import store
from selfplay.errors import DataError, NoPairsError
from selfplay.preferences import our_records
from selfplay.recipe_train import reads
from selfplay.train.settings import TrainJob
from selfplay.types import Demonstration, PreferencePair, TrainRow


def read_rows(job: TrainJob) -> tuple[Sequence[TrainRow], int]:
    """(rows to train on, rows left out for being over max_length).

    Where no loss reads a rejected completion (`loss_type: sft`) a pair becomes a demonstration of its chosen one, and the
    rejected one is never forwarded. A completion that is chosen in several pairs counts once for each, as it does in a list
    of losses with `sft`; it is forwarded once, since a pack holds it once. NoPairsError where no row is left.
    """
    path, limit = Path(job.pairs), job.settings.max_length
    rows = _rows(path, with_rejected="rejected" in reads(job.settings.loss_type))
    fitting = [row for row in rows if limit is None or _length(row) <= limit]
    if not fitting:
        raise NoPairsError(f"{path}: no pair to train on ({len(rows)} read, the rest over max_length {limit})")
    return fitting, len(rows) - len(fitting)


def _rows(path: Path, *, with_rejected: bool) -> Sequence[TrainRow]:
    if our_records(str(path)) is Demonstration:
        if with_rejected:
            raise DataError(
                f"{path}: demonstrations have no rejected completion, which this train.loss_type reads. Say loss_type: sft"
            )
        return store.read_records(path, Demonstration)
    pairs = store.read_records(path, PreferencePair)
    return pairs if with_rejected else [demonstration_of(pair) for pair in pairs]


def demonstration_of(pair: PreferencePair) -> Demonstration:
    """The chosen completion of a pair."""
    return Demonstration(
        pair.prompt_id, pair.prompt, pair.chosen, pair.prompt_token_ids, pair.chosen_token_ids, pair.weight
    )


def _length(row: TrainRow) -> int:
    return len(row.prompt_token_ids) + max(map(len, row.completions))
