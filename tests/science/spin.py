"""Experiment A: what it trains beside rounds of SPIN, and how it scores gold answers."""

from dataclasses import dataclass
from pathlib import Path

from figures import read_groups
from lab import Item, Lab, Values
from splits import write_split
from steps import fit

from selfplay import store
from selfplay.errors import DataError
from selfplay.models import load_chat
from selfplay.preferences import read_demonstrations
from selfplay.types import Demonstration, Group


def prepare(lab: Lab, *, data_only: bool = False) -> None:
    """The split, and the policy after SFT."""
    source = lab.file("instructions", "rows of instruction/input/output with short answers")
    write_split(source, lab.plan["data"], Path(lab.files["data"]))
    lab.file("embeddings", "a folder of a sentence-transformers model")
    if not data_only:
        sft_policy(lab)


def demonstrations(lab: Lab, part: str) -> tuple[Demonstration, ...]:
    recipe = lab.recipe()
    chat = load_chat(lab.model, recipe.chat)
    return read_demonstrations(f"{lab.files['data']}/{part}.jsonl", chat, recipe.prompts).rows


def sft_policy(lab: Lab) -> Path:
    """The policy of the epoch with the lowest dev loss; best.json has the loss of every epoch, the model's own first."""
    folder, plan = lab.out / "sft-epochs", lab.plan["sft"]
    best = folder / "best.json"
    if not best.exists():
        from scoring import logp_per_token, logps_of

        rows = demonstrations(lab, "dev")
        policies, losses = [Path(lab.model)], [-logp_per_token(logps_of(Path(lab.model), rows), rows)]
        while len(losses) <= plan["most_epochs"] and (len(losses) < 3 or losses[-1] < losses[-2]):
            epoch = len(losses) - 1
            out, after = folder / f"epoch-{epoch}", folder / f"epoch-{epoch - 1}" if epoch else None
            rows_file = Path(lab.files["data"]) / "train.jsonl"
            policies.append(fit(lab, plan["set"], policies[-1], rows_file, out, seed=0, after=after, round=epoch))
            losses.append(-logp_per_token(logps_of(policies[-1], rows), rows))
        epoch = min(range(1, len(losses)), key=lambda n: losses[n]) - 1
        store.write_json(best, {"epoch": epoch, "dev_loss": losses})
    kept = folder / f"epoch-{store.read_json(best)['epoch']}" / "policy"
    for other in folder.glob("epoch-*/policy"):
        if other != kept:
            store.remove_folder(other)
    for state in folder.glob("epoch-*/train/optimizer.safetensors*"):
        state.unlink()
    return kept


def spin_run(lab: Lab, seed: int) -> Path:
    """The run of SPIN with a seed, at its chosen rate."""
    item = Item("spin", seed, "only")
    done = lab.done(item)
    if done is None:
        raise DataError(f"A: {item.place} must be played first")
    return lab.folder(item) / f"rate-{done['rate']:g}" / "run"


def train_longer(lab: Lab, item: Item, start: Path, values: Values, out: Path) -> Path:
    """The pairs of SPIN's first round, once for each of its rounds."""
    pairs = spin_run(lab, item.seed) / "round-000" / "pairs.jsonl"
    epochs = lab.recipe().rounds * int(lab.plan["set"]["train.num_train_epochs"])
    values = {**values, "train.num_train_epochs": epochs}
    return fit(lab, values, start, pairs, out, seed=item.seed)


def train_sft(lab: Lab, item: Item, start: Path, values: Values, out: Path) -> Path:
    """More SFT, for the steps in which it sees the tokens that SPIN's training saw."""
    finished = sorted(spin_run(lab, item.seed).glob("round-*/train/result.json"))
    tokens = sum(store.read_json(path)["num_tokens"] for path in finished)
    epoch = store.read_json(lab.out / "sft-epochs" / "epoch-0" / "train" / "result.json")
    steps = max(1, round(tokens / (epoch["num_tokens"] / epoch["num_steps"])))
    more = {"train.loss_type": "sft", "train.beta": None, "train.max_steps": steps}
    rows = Path(lab.files["data"]) / "train.jsonl"
    return fit(lab, {**more, **values}, start, rows, out, seed=item.seed)


@dataclass(frozen=True, slots=True)
class HeldoutRow:
    """A test row: its gold answer, and the fresh completion (of the SFT policy, temperature 1) that it is to be told from."""

    group: Group
    gold: Demonstration

    @property
    def prompt(self) -> str:
        return self.group.prompt.text

    @property
    def fresh_token_ids(self) -> tuple[int, ...]:
        return self.group.completions[0].token_ids

    @property
    def same(self) -> bool:
        """Gold answer and fresh completion are the same tokens, so that nothing tells them apart."""
        return self.gold.completion_token_ids == self.fresh_token_ids


def heldout_rows(lab: Lab, seed: int) -> list[HeldoutRow]:
    """The test rows of a seed, in the order of logps.json."""
    golds = {row.prompt_id: row for row in demonstrations(lab, "test")}
    panel = lab.folder(Item("sft", seed, "only")) / "test" / "heldout" / "temperature"
    return [HeldoutRow(group, golds[group.prompt.id]) for group in read_groups(panel) if group.prompt.id in golds]


def score_gold(lab: Lab, item: Item, policy: Path) -> None:
    """logps.json: of every test row the summed logps (nats) of the gold answer and of the fresh completion."""
    from scoring import logp_per_token, logps_of

    from selfplay.train.reference import as_demonstration

    path = lab.folder(item) / "logps.json"
    if path.exists():
        return
    rows = heldout_rows(lab, item.seed)
    gold = [row.gold for row in rows]
    sums = logps_of(policy, [*gold, *(as_demonstration(row.group, row.fresh_token_ids) for row in rows)])
    found = {
        "gold": sums[: len(gold)],
        "fresh": sums[len(gold) :],
        "gold_per_token": logp_per_token(sums[: len(gold)], gold),
    }
    store.write_json(path, found)
