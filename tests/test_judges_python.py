"""Judges by import path: nothing runs unless allowed, and any change of the file is another judge."""

import pytest

from selfplay.errors import JudgeError, RecipeError, SecurityError
from selfplay.judges.contract import judge_checked
from selfplay.judges.python import load_python_judge
from selfplay.protocols import Judge, JudgeContext, StagedJudge
from selfplay.types import Completion, Group, Message, Prompt

GROUP = Group(Prompt("p", (Message("user", "hi"),)), (1,), (Completion("aaa"), Completion("b")))
FILE = """
from dataclasses import dataclass
from pathlib import Path
from contextlib import contextmanager

from selfplay.judges.lift import pairwise, pointwise
from selfplay.types import Judgement

(Path(__file__).parent / "ran").touch()

def shorter(prompt, completion):
    return -len(completion.text)

def with_default(prompt, completion, scale=2.0, *, more=1):
    return scale * len(completion.text)

def longer(prompt, a, b):
    return float(len(a.text) > len(b.text))

@pointwise
def decorated(prompt, completion):
    return 7.0

async def later(prompt, completion):
    return 1.0

@dataclass
class Always:
    value: float
    def judge(self, groups, context):
        return [Judgement(g.prompt.id, (self.value,) * len(g.completions)) for g in groups]

always = Always(0.5)

class Staged(Always):
    @contextmanager
    def stage(self, folder, note):
        note("opened")
        yield
        note("closed")

staged = Staged(1.0)
one = lambda prompt: 1.0
four = lambda a, b, c, d: 1.0
def keyword(prompt, completion, *, must): return 1.0
number = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_judges.py").write_text(FILE)
    return tmp_path


def scores(judge):
    return judge_checked(judge, [GROUP], JudgeContext())[0].scores


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("shorter", (-3.0, -1.0)),
        ("with_default", (6.0, 2.0)),
        ("longer", (1.0, 0.0)),
        ("decorated", (7.0, 7.0)),
        ("later", (1.0, 1.0)),
        ("always", (0.5, 0.5)),
    ],
)
def test_functions_and_objects_of_a_file_become_judges(folder, name, wanted):
    judge = load_python_judge(f"my_judges.py:{name}", folder, allow_code=True)
    assert isinstance(judge, Judge)
    assert scores(judge) == wanted


def test_a_loaded_judge_that_has_stages_gets_them(folder, tmp_path):
    judge = load_python_judge("my_judges.py:staged", folder, allow_code=True)
    assert isinstance(judge, StagedJudge)
    said = []
    with judge.stage(tmp_path, said.append):
        assert scores(judge) == (1.0, 1.0)
    assert said == ["opened", "closed"]
    with load_python_judge("my_judges.py:always", folder, allow_code=True).stage(tmp_path, said.append):
        assert len(said) == 2


@pytest.mark.parametrize("target", ["my_judges.py:shorter", "my_judges.py:nothing", "missing.py:x", "os.path:join"])
def test_nothing_runs_unless_allowed(folder, target):
    with pytest.raises(SecurityError, match="--allow-code") as caught:
        load_python_judge(target, folder, allow_code=False)
    assert caught.value.exit_code == 77
    assert not (folder / "ran").exists()
    load_python_judge("my_judges.py:shorter", folder, allow_code=True)
    assert (folder / "ran").exists()


@pytest.mark.parametrize("name", ["one", "four", "keyword", "number", "Always"])
def test_what_does_not_judge_is_refused_by_name(folder, name):
    with pytest.raises(RecipeError, match=f"my_judges.py:{name}"):
        load_python_judge(f"my_judges.py:{name}", folder, allow_code=True)


@pytest.mark.parametrize(
    "target", ["my_judges.py", ":shorter", "my_judges.py:", "my_judges.py:a.b", "", "my_judges.py:a b"]
)
def test_a_malformed_target_is_refused_before_anything_else(folder, target):
    with pytest.raises(RecipeError, match=r"file\.py:name"):
        load_python_judge(target, folder, allow_code=False)


def test_a_missing_file_module_or_name_is_a_recipe_error(folder):
    for target in ("missing.py:x", "no_such_package.module:x", "no_such_module:x", "sys:exit"):
        with pytest.raises(RecipeError, match=r"judge\.target"):
            load_python_judge(target, folder, allow_code=True)
    with pytest.raises(RecipeError, match='did you mean "shorter"'):
        load_python_judge("my_judges.py:shortr", folder, allow_code=True)


def test_a_module_of_a_package_can_be_named(folder, monkeypatch):
    package = folder / "judging_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rules.py").write_text("def f(prompt, completion): return 2")
    monkeypatch.syspath_prepend(folder)
    judge = load_python_judge("judging_package.rules:f", folder, allow_code=True)
    assert scores(judge) == (2.0, 2.0)
    assert judge.identity.startswith("python:judging_package.rules:f sha256:")


def test_the_identity_changes_with_any_byte_of_the_file_and_not_with_its_place(folder, tmp_path_factory):
    target = "my_judges.py:shorter"
    first = load_python_judge(target, folder, allow_code=True).identity
    moved = tmp_path_factory.mktemp("moved")
    (moved / "my_judges.py").write_text(FILE)
    assert load_python_judge(target, moved, allow_code=True).identity == first
    assert load_python_judge(f"{moved}/{target}", folder, allow_code=True).identity == first
    assert load_python_judge("my_judges.py:longer", folder, allow_code=True).identity != first
    (folder / "my_judges.py").write_text(FILE + "\n")
    assert load_python_judge(target, folder, allow_code=True).identity != first


def test_an_edited_file_runs_as_it_is_now(folder):
    file = folder / "edited.py"
    for value in (1, 2, 3):
        file.write_text(f"def f(prompt, completion): return {value}")
        assert scores(load_python_judge("edited.py:f", folder, allow_code=True)) == (value, value)


@pytest.mark.parametrize("body", ["1 / 0", "def f(:", "import sys; sys.exit(0)", "import no_such_module_at_all"])
def test_a_file_that_fails_on_import_is_named_with_its_cause(folder, body):
    (folder / "broken.py").write_text(body)
    with pytest.raises(JudgeError, match=r"broken\.py failed on import") as caught:
        load_python_judge("broken.py:f", folder, allow_code=True)
    assert caught.value.__cause__ is not None


def test_a_file_can_import_its_neighbours(folder):
    (folder / "neighbour_of_judges.py").write_text("SCORE = 4")
    (folder / "importing.py").write_text(
        "def f(prompt, completion):\n    from neighbour_of_judges import SCORE\n    return SCORE"
    )
    assert scores(load_python_judge("importing.py:f", folder, allow_code=True)) == (4.0, 4.0)


def test_an_error_of_a_loaded_function_names_the_prompt(folder):
    (folder / "raising.py").write_text("def f(prompt, completion): raise ValueError('boom')")
    with pytest.raises(JudgeError, match=r"prompt p, completion 0: ValueError: boom"):
        scores(load_python_judge("raising.py:f", folder, allow_code=True))
