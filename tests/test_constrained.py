"""Constrained verdicts: an engine that can say nothing but a choice, and servers that are asked for one."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_server import Server, says

from selfplay.chat import Chat
from selfplay.errors import GeneratorError, RecipeError
from selfplay.generators.choices import Choices
from selfplay.generators.engine import EngineSettings, Request, request_from_json, request_to_json
from selfplay.generators.generator import EngineGenerator
from selfplay.generators.sampling import Sampler
from selfplay.judges.api import ApiJudge
from selfplay.judges.choices import read_choice, verdict_choices
from selfplay.judges.llm import LLMJudge
from selfplay.judges.template import JudgeTemplate, load_template, parse_template
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.types import Completion, Group, Message, Prompt, Sampling, prompt_id

SHORT = "[user]\n{prompt}\n{completion}"
SCALE = 'parse: {line: "Score: <n>", min: 0, max: 2}'


def template_of(keys: str, mode: str = "pointwise", body: str = SHORT) -> JudgeTemplate:
    return parse_template(f"---\nname: t\nversion: 1\nmode: {mode}\n{keys}\n---\n{body}", where="t", digest="d")


def group_of(*texts: str) -> Group:
    messages = (Message("user", "name a bird"),)
    return Group(Prompt(prompt_id(messages), messages), (1,), tuple(Completion(text) for text in texts))


@pytest.fixture(scope="module")
def generator(tiny: Path, chat: Chat) -> Iterator[EngineGenerator]:
    settings = EngineSettings("transformers", str(tiny), dtype="float32", stop_token_ids=chat.stop_token_ids)
    with EngineGenerator(settings, chat, isolate=False) as made:
        yield made


def requests_of(chat: Chat, choices: tuple[str, ...], count: int, **sampling: Any) -> list[Request]:
    prompt = chat.encode_messages((Message("user", "How good?"),))
    return [Request(str(n), prompt, n, Sampling(max_tokens=30, **sampling), choices) for n in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_a_completion_with_choices_is_one_of_them_and_ends_by_itself(
    generator: EngineGenerator, chat: Chat, temperature: float
) -> None:
    choices = ("Score: 0", "Score: 10", "Score: 1", "the", "none, é")
    free = requests_of(chat, (), 2)
    results = generator.complete(
        [
            *requests_of(chat, choices, 24, temperature=temperature),
            *(replace(request, id=f"free {request.id}") for request in free),
        ]
    )
    texts = {id: chat.tokenizer.decode(list(r.token_ids), skip_special_tokens=True) for id, r in results.items()}
    bound = [id for id in results if not id.startswith("free")]
    assert {texts[id] for id in bound} <= set(choices)
    assert all(results[id].stop_reason in chat.stop_token_ids for id in bound)
    # what is free in the same batch stays as it is drawn alone
    alone = generator.complete(free)
    assert [results[f"free {id}"].token_ids for id in alone] == [alone[id].token_ids for id in alone]


def test_choices_are_drawn_as_probable_as_the_model_finds_them_and_logps_stay_raw(
    generator: EngineGenerator, chat: Chat
) -> None:
    from transformers import AutoModelForCausalLM

    prompt = chat.encode_messages((Message("user", "How good?"),))
    model = AutoModelForCausalLM.from_pretrained(generator.settings.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logps_V = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    most = [int(i) for i in logps_V.argsort(descending=True) if 6 <= i < 262][:40]
    ids = {text: i for i in most if (text := chat.tokenizer.decode([i])).isascii() and text.isalnum()}
    one, other = list(ids)[:2]
    drawn = generator.complete(requests_of(chat, (one, other), 400)).values()
    counts = Counter(chat.tokenizer.decode(list(r.token_ids), skip_special_tokens=True) for r in drawn)
    wanted = 1 / (1 + math.exp(float(logps_V[ids[other]] - logps_V[ids[one]])))
    assert abs(counts[one] / 400 - wanted) < 0.08  # over 3 standard deviations
    for result in drawn:
        assert result.logps[0] == pytest.approx(float(logps_V[result.token_ids[0]]), abs=1e-3)


def test_what_is_not_allowed_is_never_drawn_whatever_the_truncation() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, -9.0]]).expand(64, -1)
    allowed = torch.tensor([[False, False, True, True]]).expand(64, -1)
    noise = torch.arange(64, dtype=torch.float64) / 64
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.5), Sampling(top_k=3, min_p=0.1)):
        ids, logps = Sampler.of([sampling] * 64, torch.device("cpu")).draw(logits, noise, allowed)
        assert set(ids.tolist()) <= {2, 3}
        torch.testing.assert_close(logps, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])


def test_a_choice_that_another_begins_with_can_end_or_go_on() -> None:
    choices = Choices(["ab", "abc", "b"], lambda text: [ord(char) for char in text], [0, 1])
    assert choices.after([]) == [97, 98]
    assert choices.after([97, 98]) == [0, 1, 99]
    assert choices.after([97, 98, 99]) == [0, 1]
    with pytest.raises(GeneratorError, match="stop token"):
        Choices(["a"], lambda text: [1], [])
    with pytest.raises(GeneratorError, match="no tokens"):
        Choices([""], lambda text: [], [0])


def test_a_special_token_in_a_choice_is_text(generator: EngineGenerator, chat: Chat) -> None:
    (result,) = generator.complete(requests_of(chat, ("<|end|>a", "<|end|>b"), 1)).values()
    assert len(result.token_ids) > 3
    assert result.token_ids[0] not in chat.stop_token_ids


def test_choices_survive_the_way_to_an_engines_process() -> None:
    request = Request("a", (1, 2), 3, Sampling(stop=("x",)), ("yes", "no"))
    assert request_from_json(json.loads(json.dumps(request_to_json(request)))) == request


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (SCALE, {"Score: 0": 0.0, "Score: 1": 1.0, "Score: 2": 2.0}),
        (
            'parse: {line: "**Score**: <n> points", min: -0.5, max: 1}',
            {"**Score**: 0 points": 0.0, "**Score**: 1 points": 1.0},
        ),
        ("labels: {good: 3, bad: -1}", {"good": 3.0, "bad": -1.0}),
    ],
    ids=["scale", "half a step", "labels"],
)
def test_the_choices_are_the_templates_scores_or_labels(keys: str, wanted: dict[str, float]) -> None:
    template = template_of(keys)
    choices = verdict_choices(template.head)
    assert choices == wanted
    # the same parser that reads free text reads each of them as the same score
    if template.head.parse is not None:
        assert {text: template.head.parse.read(text).score for text in choices} == wanted


def test_the_shipped_pairwise_choices_cover_a_tie() -> None:
    choices = verdict_choices(load_template("pairwise_helpfulness", Path()).head)
    assert {choices[f"Better: {word}"] for word in ("A", "B", "tie")} == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.9), (0, 1000), (0.5, 1.5)])
def test_a_range_without_a_list_of_whole_numbers_is_refused(low: float, high: float) -> None:
    template = template_of(f'parse: {{line: "Score: <n>", min: {low}, max: {high}}}')
    with pytest.raises(RecipeError, match=r"judge\.verdict is constrained, and from .* whole numbers"):
        LLMJudge(template, verdict="constrained")


def test_a_judge_with_constrained_verdicts_always_scores_and_never_outside_the_scale(
    generator: EngineGenerator,
) -> None:
    group, context = group_of("a wren", "no idea", ""), JudgeContext(seed=5, generator=generator)
    (free,) = LLMJudge(template_of(SCALE), max_tokens=20).judge([group], context)
    assert free.scores == (None, None, None)  # a model of random weights writes no verdict by itself
    judge = LLMJudge(template_of(SCALE), verdict="constrained", num_verdicts=3, temperature=1.0, max_tokens=20)
    (judgement,) = judge.judge([group], context)
    assert all(len(drawn) == 3 and {*drawn} <= {0.0, 1.0, 2.0} for drawn in judgement.verdicts)
    assert judgement.scores == pytest.approx([sum(v for v in drawn if v) / 3 for drawn in judgement.verdicts])
    assert judge.judge([group], context) == [judgement]


def test_labels_alone_can_be_constrained_and_pairwise_swaps_are_undone(generator: EngineGenerator) -> None:
    template = template_of("labels: {first: 1, second: 0}", "pairwise", "[user]\n{completion_a}\n{completion_b}")
    judge = LLMJudge(template, verdict="constrained", max_tokens=20)
    (judgement,) = judge.judge([group_of("wren", "owl")], JudgeContext(generator=generator))
    assert judgement.num_compared == 1
    assert sum(score for score in judgement.scores if score is not None) == 1.0


def test_each_way_to_a_verdict_has_its_own_identity() -> None:
    template = template_of(f"{SCALE}\nlabels: {{the: 1, and: 0}}")
    ways = ("parse", "labels", "constrained")
    assert len({LLMJudge(template, verdict=way).identity for way in ways}) == 3


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 2", 2.0),
        (" Score: 2\n", 2.0),
        ('{"verdict": "Score: 1"}', 1.0),
        ('{"verdict":\n "Score: 0"\n}', 0.0),
        ("Score: 3", None),
        ("I think\nScore: 2", None),
        ("", None),
        ('{"verdict": 2}', None),
        ('{"verdict": ["Score: 1"]}', None),
        ('{"score": "Score: 1"}', None),
        ('{"verdict": "Score: 1"', None),
        ("{" * 100_000, None),
        ("[" * 100_000, None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_text_that_is_no_choice_is_none_with_a_note(text: str, score: float | None) -> None:
    found = read_choice(text, verdict_choices(template_of(SCALE).head), cut=False)
    assert found.score == score
    assert (found.note == "") == (score is not None)
    assert "max_tokens" in read_choice("Scor", {"Score: 1": 1.0}, cut=True).note


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 1", None),
        (" Score: 1", None),
        ("Score: 1\n", 1.0),
        ("Score: 10", 10.0),
        ("Score: 2", 2.0),
        ('{"verdict": "Score: 1"}', 1.0),
        ('{"verdict": "Score: 1', None),
        ("", None),
    ],
    ids=repr,
)
def test_a_cut_text_that_another_choice_begins_with_is_none(text: str, score: float | None) -> None:
    choices = {"Score: 1": 1.0, "Score: 10": 10.0, "Score: 2": 2.0}
    found = read_choice(text, choices, cut=True)
    assert found.score == score
    assert score is not None or "max_tokens cut the verdict" in found.note
    assert read_choice("Score: 1", choices, cut=False).score == 1.0


def api_judge(url: str, **fields: Any) -> ApiJudge:
    recipe = ApiJudgeRecipe.model_validate({"kind": "api", "base_url": url, "model": "m", "max_retries": 0} | fields)
    return ApiJudge(template_of(SCALE), recipe, pause=0.001)


def test_an_endpoint_is_asked_for_a_choice_in_the_field_that_the_recipe_names() -> None:
    with Server(lambda asked: says('{"verdict": "Score: 2"}')) as server:
        for constraint in ("response_format", "structured_outputs"):
            judge = api_judge(server.url, verdict="constrained", constraint=constraint)
            assert judge.judge([group_of("a")], JudgeContext())[0].scores == (2.0,)
    choices = ["Score: 0", "Score: 1", "Score: 2"]
    first, second = (asked.body for asked in server.asked)
    schema = first["response_format"]["json_schema"]["schema"]
    assert first["response_format"]["type"] == "json_schema"
    assert schema["properties"] == {"verdict": {"type": "string", "enum": choices}}
    assert (schema["required"], schema["additionalProperties"]) == (["verdict"], False)
    assert second["structured_outputs"] == {"choice": choices}
    assert "response_format" not in second
    assert "structured_outputs" not in first


def test_an_endpoint_that_ignores_the_constraint_gives_no_verdict() -> None:
    with Server(lambda asked: says("It is fine.\nScore: 2")) as server:
        judgement = api_judge(server.url, verdict="constrained").judge([group_of("a")], JudgeContext())[0]
    assert judgement.scores == (None,)
    assert "constraint was not kept" in judgement.notes[0]
