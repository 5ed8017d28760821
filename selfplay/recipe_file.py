"""Reading and writing recipe files: strict YAML in, errors with dotted path and line out."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from selfplay.errors import RecipeError
from selfplay.recipe import Recipe
from selfplay.recipe_filters import FilterRecipe
from selfplay.recipe_judges import (
    JudgeRecipe,
    MemberRecipe,
)
from selfplay.recipe_pairs import PairsRecipe
from selfplay.recipe_paths import with_absolute_paths
from selfplay.recipe_prompts import HELDOUT_TAGS

TAGS = {"one value", "per round", *HELDOUT_TAGS}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-7` as text and `on` as true; recipes follow YAML 1.2 in both."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(*_FLOAT)


class _Dumper(yaml.SafeDumper):
    """Quotes the text `5e-7`, which YAML 1.1 writes bare and _Loader would read as a number."""


_Dumper.add_implicit_resolver(*_FLOAT)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe of a file, its paths absolute; `overrides` are texts like "train.learning_rate=1e-6".

    Raises RecipeError with the dotted path, the line, what was found and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't read this recipe ({error})") from error
    data, lines = parse_yaml(text, str(path))
    spots = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        given = _apply(data, override)
        spots = {key: spot for key, spot in spots.items() if key[: len(given)] != given}
        spots[given] = f"--set {override}"
    return with_absolute_paths(check_recipe(data, str(path), spots), path.resolve().parent)


def parse_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping in `text` and the line of each of its keys. Refuses duplicate keys, aliases and tags."""
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 0
                raise RecipeError(f"{where}:{line}: recipes take no YAML aliases; write the value out")
        root = yaml.compose(text, Loader=_Loader)
        lines: dict[tuple[str, ...], int] = {}
        _collect_lines(root, (), lines, where)
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, found {type(data).__name__}")
    return data, lines


def _collect_lines(node: Any, at: tuple[str, ...], lines: dict[tuple[str, ...], int], where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(child, (*at, str(index)), lines, where)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = (*at, str(key.value))
        line = key.start_mark.line + 1
        if path in lines:
            raise RecipeError(f"{where}:{line}: {'.'.join(path)} is given twice (first on line {lines[path]})")
        lines[path] = line
        _collect_lines(value, path, lines, where)


def _apply(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets one value and returns where."""
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise RecipeError(f"--set {override}: write it as key.subkey=value")
    value = parse_yaml(f"value: {text}", f"--set {override}")[0]["value"]
    at = data
    for part in parts[:-1]:
        if not isinstance(at.setdefault(part, {}), dict):
            raise RecipeError(f"--set {override}: {part} holds a value, not a section")
        at = at[part]
    at[parts[-1]] = value
    return tuple(parts)


def check_recipe(data: dict[str, Any], where: str, spots: dict[tuple[str, ...], str] | None = None) -> Recipe:
    """The recipe in a mapping; RecipeError lists every fault, one a line. `spots` says where each key was written."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = [_describe(fault, data, where, spots or {}) for fault in error.errors()]
        raise RecipeError("\n".join(faults)) from None


def _describe(fault: Any, data: dict[str, Any], where: str, spots: dict[tuple[str, ...], str]) -> str:
    location = _without_kinds([str(part) for part in fault["loc"] if part not in TAGS])
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        location.append("kind")
    spot, near = where, tuple(location)
    while near and near not in spots:
        near = near[:-1]
    if near:
        spot = spots[near]
    dotted = ".".join(location) or "recipe"
    if fault["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1], data)
        close = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
        hint = f'did you mean "{close[0]}"?' if close else f"allowed: {', '.join(allowed)}"
        return f"{spot}: {dotted}: unknown key; {hint}"
    if fault["type"] == "union_tag_invalid":
        return f"{spot}: {dotted}: there is no kind {fault['ctx']['tag']!r}; allowed: {fault['ctx']['expected_tags']}"
    if fault["type"] in ("missing", "union_tag_not_found"):
        return f"{spot}: {dotted}: missing; this key is required"
    found = repr(fault["input"])
    # where a key was written by mistake it must not be shown
    hidden = isinstance(fault["input"], dict) or location[-1:] in (["api_key_env"], ["base_url"])
    found = "" if hidden else f" (found {found[:77] + '...' if len(found) > 80 else found})"
    return f"{spot}: {dotted}: {fault['msg'].removeprefix('Value error, ')}{found}"


def _without_kinds(location: list[str]) -> list[str]:
    """A discriminated union puts the kind into the location: judge.verifier.checks, pairs.filters.0.mix_previous.window; any
    other union its member: window.literal['all']; a mapping's key itself [key]; one of several judges the field judge.
    """
    kept: list[str] = []
    for part in location:
        in_list = bool(kept) and kept[-1].isdigit()
        under = kept[-2] if in_list else "".join(kept[-1:])
        # a source may be named judges, and then its judge is no field of a member
        unwritten = (part == "judge" and under == "judges" and in_list) or part == "[key]"
        if part not in _KINDS.get(under, ()) and not part.startswith(("tagged-union[", "literal[")) and not unwritten:
            kept.append(part)
    return kept


def _kinds(union: Any) -> set[str]:
    return {kind for model in _models_in(union) for kind in get_args(model.model_fields["kind"].annotation)}


def _keys_at(location: list[str], data: dict[str, Any]) -> list[str]:
    """The keys that a section allows, found by following the model's fields."""
    model: type[BaseModel] = Recipe
    value: Any = data
    models = [model]
    for n, part in enumerate(location):
        if isinstance(value, list):
            value = value[int(part)]
        else:
            value = value.get(part, {}) if isinstance(value, dict) else {}
            # the name of a source is the user's, also where a field has the same
            named = location[:n] == ["sources"] or part not in model.model_fields
            models = models if named else _models_in(model.model_fields[part].annotation)
        kind = value.get("kind") if isinstance(value, dict) else None
        model = next(
            (m for m in models if "kind" in m.model_fields and kind in get_args(m.model_fields["kind"].annotation)),
            models[0],
        )
    member = location[-2:-1] == ["judges"] and location[-1].isdigit()  # beside its judge's keys it has a weight
    return [*model.model_fields, *(["weight"] if member else [])]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if annotation is MemberRecipe:  # whose judge's keys stand in its place
        annotation = MemberRecipe.model_fields["judge"].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


_KINDS = {kind: _kinds(JudgeRecipe) for kind in ("judge", "judges")}
_KINDS |= {"pairs": _kinds(PairsRecipe), "filters": _kinds(FilterRecipe)}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=100)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, as "key: old -> new"."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys]


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """The values of a recipe, as `model_dump` gives it, by dotted key."""
    # several judges change key by key; any other list changes as a whole
    if at.rpartition(".")[2] == "judges" and isinstance(value, list):
        value = {str(n): judge for n, judge in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {at: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{at}.{key}" if at else key).items()}


def recipe_folder() -> Path:
    """Where the recipes lie: in an installed package inside it, in a source checkout beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
