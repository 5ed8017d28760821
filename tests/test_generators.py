"""Engines and generators on the tiny model: the transformers engine in this process and in a child, and the scripted one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_model
from transformers.utils import logging

from selfplay.chat import Chat
from selfplay.errors import DataError, GeneratorError, RecipeError
from selfplay.generators import environment
from selfplay.generators.engine import EngineSettings, Request, Result
from selfplay.generators.environment import child_environment, cpu_computes_bf16
from selfplay.generators.generator import EngineGenerator
from selfplay.generators.isolated import EngineDiedError, IsolatedEngine
from selfplay.generators.sampling import Sampler
from selfplay.generators.scripted import ScriptedGenerator
from selfplay.generators.transformers import TransformersEngine, _StopStrings
from selfplay.protocols import Generator
from selfplay.types import Message, Prompt, Sampling, derive_seed, prompt_id

TEXTS = ("Name a bird.", "What is the sea?", "Hi", "Tell me of the moon and the tide, in two lines or three.", "And?")


def prompt_of(text: str, gold: str | None = None) -> Prompt:
    messages = (Message("user", text),)
    return Prompt(prompt_id(messages), messages, gold=gold)


PROMPTS = tuple(prompt_of(text) for text in TEXTS)


@pytest.fixture(scope="module")
def settings(tiny: Path, chat: Chat) -> EngineSettings:
    return EngineSettings("transformers", str(tiny), dtype="float32", stop_token_ids=chat.stop_token_ids)


@pytest.fixture(scope="module")
def generator(settings: EngineSettings, chat: Chat) -> Iterator[EngineGenerator]:
    with EngineGenerator(settings, chat, isolate=False) as made:
        yield made


@pytest.fixture(scope="module")
def hf(tiny: Path) -> "torch.nn.Module":
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def reference_logps(hf: "torch.nn.Module", prompt: Sequence[int], completion: Sequence[int]) -> "torch.Tensor":
    """Raw logps of a completion from one plain forward."""
    with torch.inference_mode():
        logits = hf(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def gone(group: int) -> bool:
    """Whether no process of a group is left, waiting up to 2 s."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if all_zombies(group):
            return True
    return False


def all_zombies(group: int) -> bool:
    """Whether what is left of a group waits only to be reaped: a container's first process may never do it."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group:
            states.append(fields[0])
    return all(state == "Z" for state in states)


# The transformers engine


def test_greedy_ids_equal_those_of_model_generate(
    generator: EngineGenerator, hf: "torch.nn.Module", chat: Chat
) -> None:
    groups = generator.generate(PROMPTS, Sampling(temperature=0.0, max_tokens=20))
    for group in groups:
        whole = hf.generate(
            torch.tensor([group.prompt_token_ids]), max_new_tokens=20, do_sample=False, eos_token_id=chat.stop_token_ids
        )
        assert whole[0, len(group.prompt_token_ids) :].tolist() == list(group.completions[0].token_ids)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.6, top_p=0.8), Sampling(top_k=5, min_p=0.05), Sampling(temperature=0.0)],
)
def test_logps_are_raw_at_temperature_one_whatever_the_sampling(
    generator: EngineGenerator, hf: "torch.nn.Module", sampling: Sampling
) -> None:
    groups = generator.generate(PROMPTS, replace(sampling, num_completions=2, max_tokens=16))
    for group in groups:
        for completion in group.completions:
            expected = reference_logps(hf, group.prompt_token_ids, completion.token_ids)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "qwen2"])
def test_logps_hold_for_other_families_past_their_sliding_window(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / family, family=family, sliding_window=8)
    chat = Chat.load(str(folder))
    settings = EngineSettings("transformers", str(folder), dtype="float32")  # no stop token: every completion is long
    with EngineGenerator(settings, chat, isolate=False) as generator:
        groups = generator.generate(PROMPTS, Sampling(num_completions=2, max_tokens=24))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for group in groups:
        for completion in group.completions:
            assert len(completion.token_ids) == 24
            expected = reference_logps(hf, group.prompt_token_ids, completion.token_ids)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=5e-4, rtol=0)


def test_the_same_requests_give_the_same_bytes(generator: EngineGenerator) -> None:
    sampling = Sampling(num_completions=3, max_tokens=24, seed=7)
    assert generator.generate(PROMPTS, sampling) == generator.generate(PROMPTS, sampling)


def test_another_seed_and_another_k_give_another_completion(generator: EngineGenerator) -> None:
    (first,) = generator.generate(PROMPTS[:1], Sampling(num_completions=4, max_tokens=24, seed=1))
    (second,) = generator.generate(PROMPTS[:1], Sampling(num_completions=4, max_tokens=24, seed=2))
    ids = [c.token_ids for c in (*first.completions, *second.completions)]
    assert len(set(ids)) == 8


def test_a_completion_depends_on_no_other_prompt(generator: EngineGenerator) -> None:
    sampling = Sampling(num_completions=2, max_tokens=16, seed=3)
    together = {group.prompt.id: group for group in generator.generate(PROMPTS, sampling)}
    for prompt in PROMPTS:
        (alone,) = generator.generate([prompt], sampling)
        assert [c.token_ids for c in alone.completions] == [c.token_ids for c in together[prompt.id].completions]


def test_batches_of_any_size_draw_the_same_completions(settings: EngineSettings, chat: Chat) -> None:
    sampling = Sampling(num_completions=3, max_tokens=16, seed=5)
    ids = []
    for size in (1, 2, 64):
        with EngineGenerator(replace(settings, max_batch_size=size), chat, isolate=False) as generator:
            groups = generator.generate(PROMPTS, sampling)
        ids.append([c.token_ids for group in groups for c in group.completions])
    assert ids[0] == ids[1] == ids[2]


def test_a_prompt_is_prefilled_once_and_finished_completions_leave_the_batch(
    settings: EngineSettings, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = TransformersEngine._forward

    def counted(engine: TransformersEngine, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(engine, ids, *rest)

    monkeypatch.setattr(TransformersEngine, "_forward", counted)
    sampling = Sampling(num_completions=6, max_tokens=64, seed=1)
    common = replace(settings, stop_token_ids=tuple(range(6, 60)))  # about a fifth of all ids: lengths vary
    with EngineGenerator(common, chat, isolate=False) as generator:
        groups = generator.generate(PROMPTS, sampling)
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    assert shapes[0] == (len(PROMPTS), max(len(chat.encode_prompt(p)) for p in PROMPTS))
    # The first token comes from the prefill; step n then runs only the completions that have more than n tokens.
    assert shapes[1:] == [(sum(length > n for length in lengths), 1) for n in range(1, max(lengths))]
    assert len(set(lengths)) > 3


def test_a_stop_token_ends_a_completion_and_stays_in_its_ids(settings: EngineSettings, chat: Chat) -> None:
    sampling = Sampling(num_completions=8, max_tokens=64, seed=1)
    free = EngineGenerator(replace(settings, stop_token_ids=()), chat, isolate=False).generate(PROMPTS[:1], sampling)
    stop = free[0].completions[0].token_ids[5]
    with EngineGenerator(replace(settings, stop_token_ids=(stop,)), chat, isolate=False) as generator:
        (group,) = generator.generate(PROMPTS[:1], sampling)
    for unstopped, completion in zip(free[0].completions, group.completions, strict=True):
        ids = unstopped.token_ids
        expected = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert completion.token_ids == expected
        assert (completion.finish_reason, completion.stop_reason) == (
            ("stop", stop) if stop in ids else ("length", None)
        )
        assert len(completion.logps) == len(expected)


def test_a_stop_string_cuts_the_text_and_never_the_ids(generator: EngineGenerator, chat: Chat) -> None:
    sampling = Sampling(num_completions=1, max_tokens=40, seed=2)
    (free,) = generator.generate(PROMPTS[:1], sampling)
    ids = free.completions[0].token_ids
    printable = [n for n, i in enumerate(ids[:-2]) if n > 3 and chat.tokenizer.decode([i]).isascii() and 6 <= i < 262]
    place = printable[0]
    stop = chat.tokenizer.decode([ids[place]])
    (group,) = generator.generate(PROMPTS[:1], replace(sampling, stop=("never written", stop)))
    completion = group.completions[0]
    first = next(n for n in range(len(ids)) if stop in chat.tokenizer.decode(list(ids[: n + 1])))
    assert completion.token_ids == ids[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert stop not in completion.text


def test_the_stop_string_that_ends_first_is_found_across_tokens(chat: Chat) -> None:
    stops = _StopStrings(chat.tokenizer)
    ids = chat.tokenizer("one, two. END of it", add_special_tokens=False)["input_ids"]
    found = [stops.find(ids[: n + 1], ("of", "END", "two. E")) for n in range(len(ids))]
    assert [f for f in found if f is not None][:2] == ["two. E", "two. E"]
    assert stops.find(ids, ()) is None
    assert stops.find(ids, ("nowhere",)) is None


def test_score_labels_are_exact_logps(generator: EngineGenerator, hf: "torch.nn.Module") -> None:
    prompts = [(0, 4, 70, 71), (0, 4, 80), (0, 4, 90, 91, 92, 93)]
    labels = [40, 41, 40, 200]
    scores = generator.score_labels(prompts, labels)
    for prompt, row in zip(prompts, scores, strict=True):
        with torch.inference_mode():
            expected = hf(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[labels]
        torch.testing.assert_close(torch.tensor(row), expected, atol=2e-4, rtol=0)


def test_loading_draws_no_bar_of_its_own(settings: EngineSettings, capfd: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    TransformersEngine(settings).close()
    assert "Loading weights" not in capfd.readouterr().err


def test_bfloat16_is_what_auto_takes_for_a_float32_policy(settings: EngineSettings) -> None:
    if not cpu_computes_bf16():
        pytest.skip("this processor has no bfloat16")
    engine = TransformersEngine(replace(settings, dtype="auto"))
    assert {p.dtype for p in engine._model.parameters()} == {torch.bfloat16}


def test_a_missing_model_and_a_wrong_dtype_are_the_users_errors(settings: EngineSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing-here"):
        TransformersEngine(replace(settings, model=str(tmp_path / "nothing-here")))
    with pytest.raises(RecipeError, match="bfloat16"):
        TransformersEngine(replace(settings, dtype="float31"))


# Drawing


def draws(sampling: Sampling, logits: Sequence[float], count: int = 4000) -> "torch.Tensor":
    """Frequencies of the ids over evenly spread noise."""
    logits_SV = torch.tensor([list(logits)]).expand(count, -1)
    noise = torch.arange(count, dtype=torch.float64) / count
    ids, _ = Sampler.of([sampling] * count, torch.device("cpu")).draw(logits_SV, noise)
    return torch.bincount(ids, minlength=len(logits)) / count


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = [2.0, 1.0, 0.0, -3.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(-1)
        found = draws(Sampling(temperature=temperature), logits)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [1, 2]),
        (Sampling(top_k=99), [0, 1, 2, 3]),
        (Sampling(top_p=0.5), [1]),
        (Sampling(top_p=0.65), [1, 2]),
        (Sampling(min_p=0.4), [1, 2]),
        (Sampling(top_k=3, top_p=0.99), [1, 2, 3]),
        (Sampling(temperature=0.0), [1]),
    ],
)
def test_truncation_keeps_the_ids_it_should(sampling: Sampling, kept: list[int]) -> None:
    probabilities = [0.05, 0.6, 0.25, 0.1]
    found = draws(sampling, torch.tensor(probabilities).log().tolist())
    expected = torch.zeros(4)
    expected[kept] = torch.tensor(probabilities)[kept] if sampling.temperature else 1.0
    torch.testing.assert_close(found, expected / expected.sum(), atol=1e-3, rtol=0)


def test_each_row_of_a_mixed_batch_keeps_its_own_sampling() -> None:
    logits_SV = torch.tensor([[0.0, 1.0, 2.0]] * 3)
    sampler = Sampler.of([Sampling(temperature=0.0), Sampling(top_k=1), Sampling()], torch.device("cpu"))
    ids, logps = sampler.draw(logits_SV, torch.zeros(3, dtype=torch.float64))
    assert ids.tolist() == [2, 2, 0]
    torch.testing.assert_close(logps, logits_SV.log_softmax(-1).gather(1, ids[:, None])[:, 0])


def test_noise_at_either_edge_never_draws_an_impossible_id() -> None:
    logits_SV = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    noise = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    ids, _ = Sampler.of([Sampling()] * 2, torch.device("cpu")).draw(logits_SV, noise)
    assert ids.tolist() == [1, 2]


# The generator


class FakeEngine:
    """Gives what `change` makes of the right results."""

    max_model_len = 400

    def __init__(self, change: Callable[[list[Result]], list[Result]], scores: int | None = None) -> None:
        self.change = change
        self.scores = scores
        self.closed = False

    def run(self, requests: Sequence[Request]) -> Iterator[Result]:
        yield from self.change([Result(r.id, (70, 1), (-1.0, -0.5), "stop", 1) for r in requests])

    def score_labels(
        self, prompts: Sequence[tuple[int, ...]], label_token_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        for place in range(len(prompts) if self.scores is None else self.scores):
            yield place, [-1.0] * len(label_token_ids)

    def close(self) -> None:
        self.closed = True


def faked(settings: EngineSettings, chat: Chat, engine: FakeEngine) -> EngineGenerator:
    generator = EngineGenerator(settings, chat, isolate=False)
    generator._engine = engine
    return generator


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results: results[:-1], "no result for 1 of 4"),
        (lambda results: [*results, results[0]], "two results"),
        (lambda results: [*results, replace(results[0], id="x/0")], "never asked for"),
        (lambda results: [replace(results[0], token_ids=(), logps=()), *results[1:]], "has 0 tokens"),
        (lambda results: [replace(results[0], logps=(-1.0,)), *results[1:]], "logps are missing"),
        (lambda results: [replace(results[0], logps=(-1.0, float("nan"))), *results[1:]], "not finite"),
    ],
)
def test_what_an_engine_may_not_return_is_found(
    settings: EngineSettings, chat: Chat, change: Callable[[list[Result]], list[Result]], message: str
) -> None:
    engine = FakeEngine(change)
    with pytest.raises(GeneratorError, match=message):
        faked(settings, chat, engine).generate(PROMPTS[:2], Sampling(num_completions=2))


def test_results_are_matched_by_id_whatever_their_order(settings: EngineSettings, chat: Chat) -> None:
    def name_yourself(results: list[Result]) -> list[Result]:
        return [replace(r, token_ids=(70 + n, 1)) for n, r in reversed(list(enumerate(results)))]

    generator = faked(settings, chat, FakeEngine(name_yourself))
    groups = generator.generate(PROMPTS[:2], Sampling(num_completions=2))
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in PROMPTS[:2]]
    assert [c.token_ids[0] for group in groups for c in group.completions] == [70, 71, 72, 73]


def test_every_request_has_the_seed_of_its_prompt_and_place(settings: EngineSettings, chat: Chat) -> None:
    asked: list[Request] = []

    class Asked(FakeEngine):
        def run(self, requests: Sequence[Request]) -> Iterator[Result]:
            asked.extend(requests)
            yield from super().run(requests)

    faked(settings, chat, Asked(list)).generate(PROMPTS, Sampling(num_completions=2, seed=11))
    assert [r.seed for r in asked] == [derive_seed(11, p.id, k) for p in PROMPTS for k in range(2)]
    assert len({r.seed for r in asked}) == len(asked)


def test_groups_carry_prompt_ids_gold_and_progress(settings: EngineSettings, chat: Chat) -> None:
    seen: list[tuple[int, int]] = []
    prompts = (prompt_of("One?", gold="The one."), prompt_of("Two?"))
    generator = faked(settings, chat, FakeEngine(list))
    groups = generator.generate(prompts, Sampling(num_completions=2), progress=lambda *done: seen.append(done))
    assert [group.prompt_token_ids for group in groups] == [chat.encode_prompt(p) for p in prompts]
    assert groups[0].gold == chat.encode_gold(prompts[0])
    assert groups[1].gold is None
    assert seen == [(1, 2), (2, 4), (3, 6), (4, 8)]


def test_a_prompt_given_twice_is_an_error(settings: EngineSettings, chat: Chat) -> None:
    with pytest.raises(GeneratorError, match="share an id"):
        faked(settings, chat, FakeEngine(list)).generate([PROMPTS[0], PROMPTS[0]], Sampling())


def test_a_prompt_without_room_for_max_tokens_names_the_limit(settings: EngineSettings, chat: Chat) -> None:
    engine = FakeEngine(list)
    with pytest.raises(GeneratorError, match=r"prompt tokens \+ max_tokens 399 .* max_model_len 400"):
        faked(settings, chat, engine).generate(PROMPTS[:1], Sampling(max_tokens=399))
    assert not engine.closed


def test_an_engine_that_answers_wrongly_is_closed(settings: EngineSettings, chat: Chat) -> None:
    engine = FakeEngine(lambda results: [*results, results[0]])
    with pytest.raises(GeneratorError):
        faked(settings, chat, engine).generate(PROMPTS[:1], Sampling())
    assert engine.closed


def test_a_missing_score_is_an_error(settings: EngineSettings, chat: Chat) -> None:
    generator = faked(settings, chat, FakeEngine(list, scores=1))
    with pytest.raises(GeneratorError, match="scored 1 of 2"):
        generator.score_labels([(0, 1), (0, 2)], [70])
    assert generator.score_labels([], [70]) == []


def test_nothing_is_started_for_no_prompts(settings: EngineSettings, chat: Chat) -> None:
    generator = EngineGenerator(replace(settings, model="nowhere"), chat, isolate=False)
    assert generator.generate([], Sampling()) == []
    assert generator._engine is None


# An engine in a child process


def process_ids(generator: EngineGenerator) -> tuple[int, ...]:
    assert isinstance(generator.engine, IsolatedEngine)
    return generator.engine.process_ids


def test_a_child_draws_what_an_engine_in_this_process_draws_and_is_gone_after_the_block(
    generator: EngineGenerator, settings: EngineSettings, chat: Chat
) -> None:
    sampling = Sampling(num_completions=2, max_tokens=12, seed=4)
    with EngineGenerator(settings, chat) as isolated:
        groups = isolated.generate(PROMPTS, sampling)
        scores = isolated.score_labels([(0, 4, 70)], [40, 41])
        (child,) = process_ids(isolated)
        assert child != os.getpid()
        assert os.getpgid(child) == child
    assert [c.token_ids for g in groups for c in g.completions] == [
        c.token_ids for g in generator.generate(PROMPTS, sampling) for c in g.completions
    ]
    assert scores[0] == pytest.approx(generator.score_labels([(0, 4, 70)], [40, 41])[0], abs=1e-5)
    assert gone(child)


def test_replicas_share_the_work(generator: EngineGenerator, settings: EngineSettings, chat: Chat) -> None:
    sampling = Sampling(num_completions=2, max_tokens=8, seed=4)
    alone = generator.generate(PROMPTS, sampling)
    engine = IsolatedEngine(replace(settings, data_parallel_size=2, max_batch_size=4))
    try:
        requests = [
            Request(f"{g.prompt.id}/{k}", g.prompt_token_ids, derive_seed(4, g.prompt.id, k), sampling)
            for g in alone
            for k in range(2)
        ]
        results = {result.id: result for result in engine.run(requests)}
        expected = {f"{g.prompt.id}/{k}": c.token_ids for g in alone for k, c in enumerate(g.completions)}
        assert {name: result.token_ids for name, result in results.items()} == expected
        assert len(set(engine.process_ids)) == 2
        assert [place for place, _ in sorted(engine.score_labels([(0, 70), (0, 71), (0, 72)], [40]))] == [0, 1, 2]
    finally:
        engine.close()
    assert all(gone(child) for child in engine.process_ids)


def test_a_killed_child_is_started_again_and_draws_the_same(
    settings: EngineSettings, chat: Chat, tmp_path: Path
) -> None:
    sampling = Sampling(num_completions=1, max_tokens=8)
    with EngineGenerator(settings, chat, log_path=tmp_path / "engine.log") as generator:
        before = generator.generate(PROMPTS, sampling)
        (first,) = process_ids(generator)
        os.kill(first, signal.SIGKILL)
        assert generator.generate(PROMPTS, sampling) == before
        (second,) = process_ids(generator)
        assert second != first
        os.kill(second, signal.SIGKILL)
        with pytest.raises(EngineDiedError, match=r"killed by SIGKILL(.|\n)*memory(.|\n)*engine\.log"):
            list(generator.engine.run([Request("a", (0, 70), 1, Sampling(max_tokens=4))]))
    assert gone(first)
    assert gone(second)


def test_what_stops_a_child_at_its_start_reaches_the_user(settings: EngineSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing-here"):
        IsolatedEngine(replace(settings, model=str(tmp_path / "nothing-here")))
    with pytest.raises(GeneratorError, match=r"TypeError(.|\n)*the end of its log(.|\n)*Traceback"):
        IsolatedEngine(replace(settings, engine_args={"no_such_argument": 1}))


def test_no_process_is_left_when_the_parent_is_killed(settings: EngineSettings, tmp_path: Path) -> None:
    program = (
        "import json, sys, threading\n"
        "from selfplay.generators.engine import settings_from_json\n"
        "from selfplay.generators.isolated import IsolatedEngine\n"
        "engine = IsolatedEngine(settings_from_json(json.loads(sys.argv[1])))\n"
        "print(engine.process_ids[0], flush=True)\n"
        "threading.Event().wait()\n"
    )
    row = {"kind": settings.kind, "model": settings.model, "dtype": settings.dtype}
    parent = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(row)],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(settings, 0),
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone_now(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(child)


def gone_now(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_vllm_is_never_run_in_this_process(settings: EngineSettings, chat: Chat) -> None:
    with pytest.raises(GeneratorError, match="isolate=True"):
        EngineGenerator(replace(settings, kind="vllm"), chat, isolate=False)


def test_each_replica_sees_its_own_devices_and_the_users_variables_win(settings: EngineSettings) -> None:
    four = replace(settings, data_parallel_size=2, tensor_parallel_size=2)
    user = {"CUDA_VISIBLE_DEVICES": "3,5,6,7", "VLLM_NO_USAGE_STATS": "0", "PYTHONPATH": "/mine"}
    found = [child_environment(four, replica, user) for replica in range(2)]
    assert [f["CUDA_VISIBLE_DEVICES"] for f in found] == ["3,5", "6,7"]
    assert all(f["VLLM_NO_USAGE_STATS"] == "0" for f in found)
    assert all(f["PYTHONPATH"].endswith(os.pathsep + "/mine") for f in found)
    with pytest.raises(RecipeError, match=r"needs 4 devices, and 2 are visible"):
        child_environment(four, 0, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_vllm_on_a_cpu_gets_all_cores_of_its_replica(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "vllm_runs_on_cpu", lambda: True)
    monkeypatch.setattr(environment, "_cores", lambda: [0, 1, 4, 5])
    two = replace(settings, kind="vllm", data_parallel_size=2)
    found = [child_environment(two, replica, {}) for replica in range(2)]
    assert [f["VLLM_CPU_OMP_THREADS_BIND"] for f in found] == ["0,1", "4,5"]
    assert [f["GOMP_CPU_AFFINITY"] for f in found] == ["0 1", "4 5"]
    assert child_environment(two, 0, {"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in child_environment(two, 0, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    compiled = replace(two, engine_args={"enforce_eager": False})
    assert ("TORCHDYNAMO_DISABLE" in found[0]) > ("TORCHDYNAMO_DISABLE" in child_environment(compiled, 0, {}))
    with pytest.raises(RecipeError, match=r"need 8 cores, and there are 4"):
        child_environment(replace(two, tensor_parallel_size=4), 0, {})


# The scripted generator


def test_the_scripted_generator_is_deterministic_and_counts(chat: Chat) -> None:
    sampling = Sampling(num_completions=3, seed=2)
    generator = ScriptedGenerator(chat)
    assert isinstance(generator, Generator)
    groups = generator.generate(PROMPTS, sampling)
    assert groups == ScriptedGenerator(chat).generate(PROMPTS, sampling)
    assert groups != generator.generate(PROMPTS, replace(sampling, seed=3))
    assert groups != ScriptedGenerator(chat, seed=1).generate(PROMPTS, sampling)
    assert (generator.num_calls, generator.num_completions) == (2, 2 * 3 * len(PROMPTS))
    assert [len(group.completions) for group in groups] == [3] * len(PROMPTS)


def test_scripted_completions_end_like_sampled_ones(chat: Chat) -> None:
    generator = ScriptedGenerator(chat, script=lambda prompt, k: f"{prompt.text} {k} <|end|>")
    (group,) = generator.generate(PROMPTS[:1], Sampling(num_completions=2))
    assert group.prompt_token_ids == chat.encode_prompt(PROMPTS[0])
    for k, completion in enumerate(group.completions):
        assert completion.text == f"{TEXTS[0]} {k} <|end|>"
        assert completion.token_ids.index(chat.stop_token_ids[0]) == len(completion.token_ids) - 1
        assert (completion.finish_reason, completion.stop_reason) == ("stop", chat.stop_token_ids[0])
    (cut,) = generator.generate(PROMPTS[:1], Sampling(max_tokens=4))
    assert len(cut.completions[0].token_ids) == 4
    assert cut.completions[0].finish_reason == "length"


def test_without_a_chat_the_scripted_ids_are_the_texts_bytes() -> None:
    generator = ScriptedGenerator(script=lambda prompt, k: "é" * 3)
    (group,) = generator.generate([prompt_of("Hi", gold="ho")], Sampling(max_tokens=3))
    assert group.completions[0].token_ids == tuple("é".encode() + "é".encode()[:1])
    assert (group.completions[0].text, group.completions[0].finish_reason) == ("é", "length")
    assert group.gold is not None
    assert group.gold.token_ids == tuple(b"ho")


def test_importing_the_generators_package_loads_no_torch() -> None:
    program = (
        "import sys, selfplay.generators, selfplay.generators.generator, selfplay.generators.scripted\n"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
