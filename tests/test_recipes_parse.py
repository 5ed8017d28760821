"""Every recipe that ships is a valid one."""

from pathlib import Path

import pytest

from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe, dump_recipe, load_recipe, parse_yaml

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    recipe.check_judged()
    assert recipe.description.strip(), "a reader of the list wants a line on what it is for"
    data, _ = parse_yaml(dump_recipe(recipe), path.name)
    assert check_recipe(data, path.name) == recipe
