"""A judge's own model reads no more tokens than it has positions, whatever length was chosen for the policy."""

from pathlib import Path

import pytest
from tiny import make_tiny_model

from selfplay.chat import Chat
from selfplay.parts import open_judge_model
from selfplay.recipe_file import check_recipe


@pytest.mark.parametrize(("asked", "found"), [(None, 128), (64, 64), (128, 128), (256, 128)], ids=str)
def test_the_length_of_the_policys_engine_is_cut_to_the_judges_own(
    asked: int | None, found: int, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "judge", max_position_embeddings=128)
    recipe = check_recipe({"model": "m", "generator": {"kind": "transformers", "max_model_len": asked}}, "test")
    with open_judge_model(recipe, model, Chat.load(str(model))) as generator:
        assert generator.max_model_len == found
