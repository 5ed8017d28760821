"""What may change in the recipe of a run that goes on: all that no finished file of it depends on.

FIRST names, for keys of a recipe, the first files that depend on them. While none of these is there, a changed key changes no
file that is. A key that isn't named has been read before the first prompt was sampled, and stays as it is.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import RecipeError
from selfplay.recipe import Recipe
from selfplay.recipe_chat import ChatRecipe
from selfplay.recipe_file import check_recipe, flat, parse_yaml
from selfplay.recipe_filters import PythonFilterRecipe
from selfplay.recipe_judges import API_CONDUCT, JUDGE_PLACES
from selfplay.recipe_pairs import PairsRecipe
from selfplay.recipe_reward import REWARD_CONDUCT
from selfplay.recipe_values import at_round

MACHINE_S_CHOICE = ("bf16", "max_pack_tokens")  # fields of `train` whose auto a run answers once

# run.json tells a moved model or data set from another one; the rest changes no result
FREE: tuple[str, ...] = (
    "description",
    "model",
    "model_revision",
    "prompts.source",
    "prompts.heldout",
    "prompts.heldout.source",
    "chat.chat_template",
)
FREE += ("train.save_steps", "audit.canaries", "audit.calibration", "pairs.max_unparsed")
FREE += tuple(
    f"{section}.{key}"
    for section in ("judge", "evaluate.judge")
    for key in (*API_CONDUCT, *REWARD_CONDUCT, *JUDGE_PLACES)
)

# How much of a machine vLLM takes. After it ran out of memory, or on another machine, a run must go on with less; of its
# completions these change no more than another batch does.
VLLM_S_SHARE = tuple(
    f"generator.{key}"
    for key in ("gpu_memory_utilization", "tensor_parallel_size", "data_parallel_size", "max_batch_size")
)

CHECKPOINTS = "round-*/train/checkpoints/step-*"  # they go when the policy is written
STEPS = (CHECKPOINTS, "round-*/train/*.safetensors", "round-*/train/result.json", "round-*/policy")
PASSED = ("round-*/reference.safetensors", *STEPS)  # the reference pass cuts its packs from the steps
TRAINED = ("pack_budget.json", "round-*/reference", *PASSED)
PAIRED = ("round-*/pairs.jsonl",)
STARTED = ("recipe.yaml",)

# what to do about a gate that stopped a run
ADVICE = """The same command goes on with another pairs.max_unparsed or train.max_audit_difference, with other `pairs` while \
no round has pairs, and with other `train` while none has trained; later, a list may give rounds that are still to come \
another value. For any other change take a new --out, or do the stages that are left one by one on the files in {folder} \
(selfplay judge, pairs, train)"""

# Patterns of files by the key, or the section, that they depend on; the longest name counts.
FIRST: dict[str, tuple[str, ...]] = {
    "pairs": PAIRED,
    "train": TRAINED,
    # engines sample from what 4-bit weights stand for, in the dtype that training computes in
    "train.lora": STARTED,
    "train.bf16": STARTED,
    "train.batch_size": PASSED,
    # a checkpoint records them, and the policy does not depend on them
    "train.max_audit_difference": (CHECKPOINTS,),
    "train.gradient_checkpointing": (CHECKPOINTS,),
    "train.full_determinism": (CHECKPOINTS,),
    **dict.fromkeys(
        (
            "train.learning_rate",
            "train.loss_weights",
            "train.beta",
            "train.label_smoothing",
            "train.simpo_gamma",
            "train.num_train_epochs",
            "train.schedule_epochs",
            "train.max_steps",
            "train.weight_decay",
            "train.adam_beta1",
            "train.adam_beta2",
            "train.adam_epsilon",
            "train.lr_scheduler_type",
            "train.lr_scheduler_kwargs",
            "train.warmup_steps",
            "train.max_grad_norm",
        ),
        STEPS,
    ),
}
# A round reads its own value of these, so a file of another round depends on no other one.
BY_ROUND = ("learning_rate", "beta", "batch_size", "num_train_epochs", "max_steps", "warmup_steps")
BY_ROUND_KEYS = tuple(f"train.{key}" for key in BY_ROUND)
BY_ROUND_KEYS += ("pairs.min_margin", "pairs.max_pairs_per_prompt", "pairs.length_rho", "pairs.k")


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of the run in a folder."""
    path = folder / "recipe.yaml"
    data, _ = parse_yaml(store.read_bytes(path).decode(), str(path))
    return check_recipe(data, str(path))


def continued(recipe: Recipe, old: Recipe, folder: Path) -> Recipe:
    """`recipe` with what `auto` became in the run in `folder`, whose own recipe is `old`. RecipeError where files of that run
    would be others under it.
    """
    kept = {name: getattr(old.train, name) for name in MACHINE_S_CHOICE if getattr(recipe.train, name) == "auto"}
    generator = recipe.generator
    if generator.kind == "auto":
        generator = generator.model_copy(update={"kind": old.generator.kind})
    new = recipe.model_copy(update={"generator": generator, "train": recipe.train.model_copy(update=kept)})
    changed = refused(old, new, folder)
    if new.rounds < old.rounds:
        changed.append(f"rounds: {old.rounds} -> {new.rounds}")
    if changed:
        raise RecipeError(
            f"{folder} holds a run of another recipe. More `rounds` may be asked of it, and what no finished file depends on "
            "may change. Take a new --out, or undo:\n  " + "\n  ".join(changed)
        )
    if new.rounds != old.rounds and new.train.schedule_scope == "run":
        raise RecipeError(f"{folder}: with schedule_scope: run the schedule spans all rounds, so `rounds` can't change")
    return new


def refused(old: Recipe, new: Recipe, folder: Path) -> list[str]:
    """The changes of a recipe that the run in `folder` can't go on with, as "key: old -> new (why)"; none where every file that
    it holds would be the same under both. `rounds` is not looked at.
    """
    free = [*FREE, "rounds"]
    if old.train.reference_path is not None and new.train.reference_path is not None:
        free.append("train.reference")
    if old.generator.kind == new.generator.kind == "vllm":
        free += VLLM_S_SHARE
    found = []
    before, after = (_values(one) for one in (old, new))
    for key in (key for key in {**before, **after} if before.get(key) != after.get(key)):
        values = before.get(key), after.get(key)
        short = _key_in_source(key)
        paths = [] if short in free else list(_dependent(short, values, old, new, folder))
        if paths:
            found.append(f"{key}: {values[0]!r} -> {values[1]!r}{_why(paths[0])}")
    if list(old.sources or ()) != list(new.sources or ()):  # ties of weights and shared prompts follow their order
        found.append(f"sources: in the order {', '.join(old.sources or ())} -> {', '.join(new.sources or ())}")
    return found


def _values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values by dotted key; a judge without a `chat` has that of one which says nothing."""
    found = flat(_without_targets(recipe).model_dump(mode="json"))
    for key in [key for key, value in found.items() if key.endswith(".chat") and value is None]:
        del found[key]
        found |= flat(ChatRecipe().model_dump(mode="json"), key)
    return found


def _dependent(key: str, values: tuple[Any, Any], old: Recipe, new: Recipe, folder: Path) -> Iterator[str]:
    """The files in `folder` that depend on a key, as paths in it."""
    by_round = key in BY_ROUND_KEYS
    if key.startswith("train.") and "run" in (old.train.schedule_scope, new.train.schedule_scope):
        by_round = False  # one schedule spans all rounds
    for pattern in _first(key, old, new):
        for path in sorted(folder.glob(pattern)):
            name = str(path.relative_to(folder))
            number = re.match(r"round-(\d+)", name)
            if by_round and number is not None and len({at_round(value, int(number[1])) for value in values}) == 1:
                continue
            yield name


def _first(key: str, old: Recipe, new: Recipe) -> tuple[str, ...]:
    """The patterns of the first files that depend on a key."""
    if key == "train.reference" and (old.train.reference_path, new.train.reference_path) != (None, None):
        return STARTED  # run.json holds the model's digest
    if key.startswith("pairs") and _reads(old) != _reads(new):
        return STARTED  # gold answers are in the groups
    parts = key.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((FIRST[name] for name in names if name in FIRST), STARTED)


def _reads(recipe: Recipe) -> dict[str, tuple[bool, bool]]:
    """What the pairing of each source reads."""
    return {name: (view.pairs.needs_gold, view.pairs.reads_scores) for name, view in recipe.by_source.items()}


def _why(path: str) -> str:
    if path in STARTED:
        return ""
    how = ": delete the folder of checkpoints to train that round from its start" if "/checkpoints/" in path else ""
    return f" ({path} depends on it{how})"


def _key_in_source(key: str) -> str:
    """A dotted key as it stands in a recipe of one source and one judge: sources.a.judge.judges.0.model is judge.model."""
    return re.sub(r"\bjudge\.judges\.\d+\.", "judge.", re.sub(r"^sources\.\w+\.", "", key))


def _without_targets(recipe: Recipe) -> Recipe:
    """The recipe without the places of its filters' programs, whose sources are in run.json."""
    update: dict[str, Any] = {"pairs": _pairs_without_targets(recipe.pairs)}
    if recipe.sources is not None:
        update["sources"] = {
            name: source.model_copy(update={"pairs": _pairs_without_targets(source.pairs)})
            for name, source in recipe.sources.items()
        }
    return recipe.model_copy(update=update)


def _pairs_without_targets(pairs: PairsRecipe) -> PairsRecipe:
    filters = [
        one.model_copy(update={"target": ""}) if isinstance(one, PythonFilterRecipe) else one for one in pairs.filters
    ]
    return pairs.model_copy(update={"filters": filters})
