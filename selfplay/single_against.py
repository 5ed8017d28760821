"""The panel that `selfplay evaluate --against` names: is it the initial policy's, and can another one be compared with it?"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.changes import read_recipe
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.panel import HeldOut, Panel
from selfplay.single import IDENTITY, engine_identity, text_digest
from selfplay.stages import shards

SAME = (
    "chat",
    "sampling",
    "generator",
    "load_in_4bit",
)  # what both panels must have been played with, beside the prompts


def opponents_identity(panel: Panel, against: Path | None, identity: dict[str, Any], chat: Chat) -> dict[str, Any]:
    """The digests of the completions that those of a model are compared with; nothing where none are. `identity` is that of the
    model's panel. RecipeError where `against` is missing or would do nothing; DataError where what it names is the panel of
    another model, of other prompts, or one played in another way.
    """
    comparing = [source for source in panel.sources if source.compares]
    if not comparing or identity["model"] == identity["initial"]:
        if against is not None:
            why = (
                "the recipe's own model is not compared with itself" if comparing else "no judge of this panel compares"
            )
            raise RecipeError(f"--against: {why}, so it would do nothing: leave it out")
        return {}
    if against is None:
        raise RecipeError(
            "the panel's judge compares completions, so a model's score is its win rate against the recipe's own model, "
            f"{panel.recipe.model}. Name the panel of that one with --against: RUN/initial of a run, or the --out of `selfplay "
            f"evaluate` with --model {panel.recipe.model}. Or name a judge in evaluate.judge that scores"
        )
    wanted = json.loads(json.dumps({"model": identity["initial"]} | {key: identity.get(key) for key in SAME}))
    found = _of_stage(against) if (against / IDENTITY).exists() else _of_run(against, panel, chat)
    differ = [f"{key}: {found.get(key)} -> {value}" for key, value in wanted.items() if found.get(key) != value]
    if differ:
        raise DataError(
            f"--against {against}: no panel of the recipe's own model as this recipe plays it. They differ in:\n  "
            + "\n  ".join(differ)
        )
    return {"against": [digest for source in comparing for digest in _completions(panel, source, against)]}


def _of_stage(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = store.read_json(folder / IDENTITY)
    return found if found["stage"] == "evaluate" else {}


def _of_run(folder: Path, panel: Panel, chat: Chat) -> dict[str, Any]:
    """The same of the panel of a run's initial policy."""
    run = folder.resolve().parent
    if folder.resolve().name != "initial" or not (run / "run.json").exists():
        raise DataError(f"--against {folder}: neither RUN/initial of a run nor the --out of `selfplay evaluate`")
    recipe, identity = read_recipe(run), store.read_json(run / "run.json")
    text = chat.template_digest_text
    is_same = identity["chat"] == hashlib.sha256(text.encode()).hexdigest()  # a run writes it in another form
    played = Panel(recipe, (), panel.report, folder).sampling(between=False)
    return {
        "model": identity["model"],
        "chat": text_digest(text) if is_same else identity["chat"],
        "sampling": json.loads(json.dumps(asdict(played))),
        "generator": engine_identity(recipe),
        "load_in_4bit": (recipe.train.lora is not None and recipe.train.lora.load_in_4bit) or None,
    }


def _completions(panel: Panel, source: HeldOut, folder: Path) -> list[str]:
    """The digests of the files with completions of the source's prompts."""
    digests = []
    for name in panel.draws(between=False):
        where = folder / "heldout" / source.name / name
        if [group.prompt.id for group in panel.opponents(source, name)] != [prompt.id for prompt in source.prompts]:
            raise DataError(f"--against {folder}: {where} holds no completions of these prompts, or not of all of them")
        digests += [store.file_digest(path) for path in shards(where)]
    return digests
