"""Programs that a recipe names are looked at without being run."""

from pathlib import Path

import pytest

from selfplay.errors import RecipeError
from selfplay.targets import check_target, num_parameters

FILE = """
from pathlib import Path
from os.path import join as joined
import json.decoder

(Path(__file__).parent / "ran").touch()
raise SystemExit("run")

def shorter(prompt, completion): return 1.0
async def later(prompt, completion): return 1.0
class Judge: pass
judge: object = Judge()
one, (two, *three) = 1, (2, 3)
if one:
    for four in range(3):
        with open("x") as five:
            six = (seven := 7)
    def eight(prompt, completion):
        inner = 3
"""
BOUND = ["shorter", "later", "Judge", "judge", "one", "two", "three", "four", "five", "six", "seven", "eight", "joined"]
BOUND += ["json", "Path"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file, and a package of the same contents that can be imported."""
    package = tmp_path / "some_judges"
    package.mkdir()
    for path in (tmp_path / "my.py", package / "__init__.py", package / "inner.py"):
        path.write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", BOUND)
def test_every_name_that_a_file_or_a_module_binds_is_found_and_nothing_is_run(place: Path, name: str) -> None:
    for target in (f"{place / 'my.py'}:{name}", f"some_judges:{name}", f"some_judges.inner:{name}"):
        check_target(target, "judge.target")
    assert not list(place.rglob("ran"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("none.py:f", "no such file"),
        ("my.py:shorten", 'did you mean "shorter"'),
        ("my.py:inner", "has no 'inner'"),
        ("bad.py:f", "is no Python that can be read"),
        ("some_judges.none:f", "no module some_judges.none with a file"),
        ("some_judges.inner.none:f", "no module some_judges.inner.none"),
        ("no_such_package.at_all:f", "no module no_such_package"),
        ("sys:path", "no module sys with a file"),
        ("some_judges:shorten", 'did you mean "shorter"'),
    ],
    ids=lambda text: text if ":" in text else "",
)
def test_what_can_not_be_loaded_is_named_and_nothing_is_run(place: Path, target: str, said: str) -> None:
    (place / "bad.py").write_text("def f(:\n")
    with pytest.raises(RecipeError) as caught:
        check_target(str(place / target) if ".py:" in target else target, "evaluate.judge.target")
    assert said in str(caught.value)
    assert str(caught.value).startswith("evaluate.judge.target '")
    assert not list(place.rglob("ran"))


@pytest.mark.parametrize(
    "line",
    ["from os.path import *", "def set():\n    global found\n    found = 1", "globals()['found'] = 1"],
    ids=["star", "global", "globals"],
)
def test_a_name_that_may_be_bound_in_a_hidden_way_is_no_fault(tmp_path: Path, line: str) -> None:
    (tmp_path / "my.py").write_text(line)
    check_target(f"{tmp_path / 'my.py'}:found", "judge.target")


def test_the_parameters_of_a_function_are_counted_and_those_of_anything_else_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "def two(prompt, completion, /, limit=3): pass\n@wrapped\nasync def three(prompt, a, b): pass\n"
        "four = lambda a, b, c, d: 1\nclass Five:\n    def three(self, a, b): pass\nraise SystemExit\n"
    )
    found = {name: num_parameters(f"{tmp_path / 'my.py'}:{name}") for name in ("two", "three", "four", "Five", "six")}
    assert found == {"two": 2, "three": 3, "four": None, "Five": None, "six": None}
    (tmp_path / "bad.py").write_text("def")
    assert num_parameters(f"{tmp_path / 'bad.py'}:f") is None
    assert num_parameters("no_such_module_here:f") is None
    assert num_parameters("selfplay.targets:num_parameters") == 1
