"""The order of completions is irrelevant to a judge, drawn verdicts included: what is drawn depends on texts alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import Act, Asked, Server, says
from tiny import make_tiny_tokenizer

from selfplay.chat import Chat
from selfplay.generators.engine import Request, Result
from selfplay.judges.api import ApiJudge
from selfplay.judges.llm import LLMJudge
from selfplay.judges.questions import Questions
from selfplay.judges.template import JudgeTemplate, load_template, parse_template
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.types import Completion, Group, Judgement, Message, Prompt, derive_seed, prompt_id

TEXTS = ("a wren", "an owl", "", "no idea", "a wren or an owl")
TEMPLATES = ("additive", "pairwise_helpfulness")
WAYS = ("parse", "constrained")
Judge = Callable[[Group], Judgement]


def group_of(texts: Sequence[str]) -> Group:
    messages = (Message("user", "name a bird"),)
    return Group(Prompt(prompt_id(messages), messages), (1,), tuple(Completion(text) for text in texts))


def drawn(template: str, seed: int, text: str) -> str:
    """What a judge says whose verdict depends on the seed and on what it is shown."""
    number = derive_seed(seed, text)
    if template == "additive":
        return f"Score: {number % 6}"
    return f"Better: {('A', 'B', 'tie')[number % 3]}"


class SeededModel:
    """A judge model that draws by seed and text."""

    def __init__(self, chat: Chat, template: str) -> None:
        self.chat = chat
        self.engine = self
        self.template = template
        self.max_model_len = 9000

    def complete(self, requests: Sequence[Request], *, progress: Any) -> Mapping[str, Result]:
        results = {}
        for request in requests:
            shown = self.chat.tokenizer.decode(list(request.prompt_token_ids))
            ids = tuple(self.chat.tokenizer.encode(drawn(self.template, request.seed, shown)))
            results[request.id] = Result(request.id, ids, (0.0,) * len(ids), "stop", None)
        return results

    def score_labels(self, prompts: Any, label_token_ids: Any, *, progress: Any) -> list[list[float]]:
        raise AssertionError


@pytest.fixture(
    scope="module", params=[(kind, t, way) for kind in ("llm", "api") for t in TEMPLATES for way in WAYS], ids="-".join
)
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    kind, template, way = request.param

    def script(asked: Asked) -> Act:
        return says(drawn(template, asked.body["seed"], asked.text))

    with Server(script) as server:
        loaded = load_template(template, Path())
        if kind == "llm":
            tokenizer = make_tiny_tokenizer()
            model = SeededModel(Chat(tokenizer, stop_token_ids=[tokenizer.eos_token_id]), template)
            llm = LLMJudge(loaded, verdict=way, num_verdicts=2)
            yield lambda group: llm.judge([group], JudgeContext(seed=3, generator=model))[0]  # type: ignore[arg-type]
        else:
            data = {"kind": "api", "base_url": server.url, "model": "m", "verdict": way, "num_verdicts": 2}
            api = ApiJudge(loaded, ApiJudgeRecipe.model_validate(data | {"template": template}))
            yield lambda group: api.judge([group], JudgeContext(seed=3))[0]


@settings(max_examples=12)
@given(order=st.permutations(range(4)), texts=st.lists(st.sampled_from(TEXTS), min_size=4, max_size=4))
def test_permuted_completions_have_permuted_scores(judge: Judge, order: list[int], texts: list[str]) -> None:
    straight = judge(group_of(texts))
    mixed = judge(group_of([texts[n] for n in order]))
    assert mixed.scores == tuple(straight.scores[n] for n in order)
    assert len(set(straight.scores)) <= len(set(texts))


@given(seed=st.integers(0, 9), texts=st.lists(st.sampled_from(TEXTS), min_size=2, max_size=4, unique=True))
@pytest.mark.parametrize("template", TEMPLATES)
def test_seeds_of_other_texts_orders_verdicts_and_runs_differ(template: str, seed: int, texts: list[str]) -> None:
    questions = Questions(load_template(template, Path()), 3)
    group = group_of(texts)
    places = list(questions.ask([group]))
    seeds = [questions.seed([group], place, n, run) for place in places for n in range(3) for run in (seed, seed + 1)]
    assert len(set(seeds)) == len(places) * 3 * 2


def test_a_new_version_of_a_template_draws_anew() -> None:
    def template(version: int) -> JudgeTemplate:
        text = "---\nname: t\nversion: {}\nmode: pointwise\nlabels: {{yes: 1, no: 0}}\n---\n[user]\n{{completion}}"
        return parse_template(text.format(version), where="t", digest="d")

    seeds = {Questions(template(version)).seed([group_of(["x"])], (0, 0), 0, 7) for version in (1, 2)}
    assert len(seeds) == 2
