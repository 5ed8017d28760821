"""What can be said of a program of the user ("file.py:name" or "package.module:name") without running any of it.

Only what is certain is a fault: a file that isn't there or is no Python, a module that can't be found, a name that nothing
in it binds. Whether the program does what it should is seen when it runs, which takes --allow-code.
"""

import ast
import difflib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from selfplay.errors import RecipeError


def check_target(target: str, key: str) -> None:
    """RecipeError where loading `target` would fail. `key` is its place in the recipe."""
    place, _, name = target.rpartition(":")
    where = f"{key} {target!r}"
    path = Path(place) if place.endswith(".py") else _source(place, where)
    if not path.is_file():
        raise RecipeError(f"{where}: {path}: no such file")
    if path.suffix != ".py":  # compiled: nothing to read
        return
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, OSError) as error:
        raise RecipeError(f"{where}: {path} is no Python that can be read ({error})") from error
    bound = set(_bound(tree))
    if name not in bound and "*" not in bound:
        close = difflib.get_close_matches(name, bound, n=1)
        raise RecipeError(f"{where}: {path.name} has no {name!r}" + (f'; did you mean "{close[0]}"?' if close else ""))


def num_parameters(target: str) -> int | None:
    """How many parameters without a default the function has that `target` names; None where the module's own lines define none
    of that name, or it can't be read.
    """
    place, _, name = target.rpartition(":")
    try:
        path = Path(place) if place.endswith(".py") else _source(place, target)
        tree = ast.parse(path.read_bytes(), str(path))
    except (RecipeError, SyntaxError, ValueError, OSError):
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
    return None


def _source(module: str, where: str) -> Path:
    """The file of a module. No package is imported on the way, as `find_spec` would of a dotted name."""
    head, *rest = module.split(".")
    try:
        spec: ModuleSpec | None = find_spec(head)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    name = head
    for part in rest:
        name = f"{name}.{part}"
        inside = None if spec is None else spec.submodule_search_locations
        spec = None if inside is None else PathFinder.find_spec(name, list(inside))
    if spec is None or spec.origin is None or not spec.has_location:
        raise RecipeError(
            f'{where}: no module {module} with a file can be found here. A file beside the recipe is written "file.py:name".'
        )
    return Path(spec.origin)


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a module's own lines bind; "*" where that can't be known, as after `from x import *`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
            if any(isinstance(inner, ast.Global) for inner in ast.walk(child)):
                yield "*"
            continue
        if isinstance(child, ast.alias):
            yield child.asname or child.name.partition(".")[0]
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, ast.Name) and child.id in ("globals", "exec", "vars"):
            yield "*"
        yield from _bound(child)
