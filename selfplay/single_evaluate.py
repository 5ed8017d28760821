"""The held-out panel of one model on its own: `selfplay evaluate`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import RecipeError
from selfplay.judges.against import measuring
from selfplay.models import load_chat, local_model, named_model, open_generator, prompt_room, resolve_auto
from selfplay.panel import HeldOut, Panel
from selfplay.parts import note_drops, panel_keys
from selfplay.progress import Reporter
from selfplay.protocols import Judge
from selfplay.recipe import Recipe, SourceView
from selfplay.single import claimed, engine_identity, open_judge, prompts_digest, text_digest
from selfplay.single_against import opponents_identity
from selfplay.sources import load_pools, plain, record_pools
from selfplay.train.four_bit import playable
from selfplay.trust import require_trust
from selfplay.types import derive_seed


def evaluate(
    recipe: Recipe, model: str, out: Path, *, allow_code: bool, report: Reporter, against: Path | None = None
) -> dict[str, Any]:
    """The held-out panel of a model, as in eval.json; its KL is to the recipe's own model. So is its win rate where the judge
    compares: `against` is the folder of that model's panel, of a run (RUN/initial) or of `evaluate`.
    """
    recipe = resolve_auto(recipe)
    folder, initial = named_model(recipe, model), local_model(recipe.model, recipe.model_revision)
    chat = load_chat(str(folder), recipe.chat)
    pools = load_pools(recipe, chat=chat, room=prompt_room(recipe, folder))
    made: dict[str, Judge] = {}
    heldout: list[HeldOut] = []

    def open_source(name: str, view: SourceView) -> None:
        prompts, asked = pools[name].heldout[: recipe.evaluate.num_prompts], view.heldout_judge
        with panel_keys(view):
            judge = open_judge(recipe, asked, allow_code=allow_code, made=made) if asked is not None else None
        judge = measuring(judge, named=view.evaluate.judge is not None)
        heldout.extend([HeldOut(name, prompts, judge)] if prompts else [])

    recipe.for_each(open_source)
    if not heldout:
        raise RecipeError("prompts.heldout: the recipe holds no prompts out, so there is nothing to evaluate on")
    judges = {one.name: one.judge for one in heldout}
    panel = Panel(recipe, tuple(heldout), report, out if against is None else against)
    digests = store.weights_digest(folder), store.weights_digest(initial)
    identity: dict[str, Any] = {
        "stage": "evaluate",
        "model": digests[0],
        "initial": digests[1],
        "chat": text_digest(chat.template_digest_text),
        "prompts": prompts_digest({one.name: one.prompts for one in heldout}),
        "judge": plain({one.name: one.judge_identity for one in heldout}),
        "sampling": asdict(panel.sampling(between=False)),
        "generator": engine_identity(recipe),
        "greedy": recipe.evaluate.greedy,
        "kl": recipe.evaluate.kl,
    }
    is_initial = digests[0] == digests[1]
    if recipe.train.lora is not None and recipe.train.lora.load_in_4bit:
        identity["load_in_4bit"] = True
    identity |= opponents_identity(panel, against, identity, chat)
    with claimed(out, identity, report):
        note_drops(pools, report)
        record_pools(pools, out)
        recipe.for_each(lambda name, view: _trust_panel(view, judges.get(name), out, report))
        folder, initial = (playable(one, out, recipe.train) for one in (folder, initial))
        with open_generator(recipe.generator, folder, chat, seed=derive_seed(recipe.seed, 0, "engine")) as generator:
            index = -1 if is_initial else recipe.rounds - 1
            panel.sample(generator, out, round=index, between=False)
            panel.judge_all(generator, out, round=index, between=False)
        figures = panel.finish(out, initial=initial, is_initial=is_initial)
    assert figures is not None
    return figures


def _trust_panel(view: SourceView, judge: Judge | None, out: Path, report: Reporter) -> None:
    """RecipeError where a reward model that scores the panel isn't shown to beat a coin."""
    require_trust("judge" if view.evaluate.judge is None else "evaluate.judge", view, judge, out, report)
