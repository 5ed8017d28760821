"""The token ids that were sampled are the ids that are trained on."""

from pathlib import Path

import torch
from jobs import random_pairs

from selfplay.chat import Chat
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator
from selfplay.pairs import BestVsWorst, GoldVsCompletion, make_pair, select_pairs
from selfplay.store import read_records, write_records
from selfplay.train.pack import build_packs
from selfplay.types import Completion, Group, Judgement, Message, PreferencePair, Prompt, Sampling, prompt_id

MESSAGES = (Message("user", "Name a bird."),)


def trained_ids(pairs: list[PreferencePair], *, shared: bool = True) -> list[list[tuple[int, ...]]]:
    """What the packs teach: per pair, the target tokens of chosen and rejected."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for pack in build_packs(pairs, range(len(pairs)), max_pack_tokens=300, shared=shared):
        for place, index in enumerate(pack.pair_B):
            assert pack.rejected_B is not None
            sides = (int(pack.chosen_B[place]), int(pack.rejected_B[place]))
            found[index] = [tuple(pack.target_N[pack.sequence_N == side].tolist()) for side in sides]
    return [found[n] for n in range(len(pairs))]


def test_pairs_keep_sampled_ids_that_tokenizing_the_text_again_would_change(chat: Chat, tmp_path: Path) -> None:
    prompt = Prompt(prompt_id(MESSAGES), MESSAGES)
    letters = tuple(chat.tokenizer.convert_tokens_to_ids(list("the"))) + chat.stop_token_ids
    whole = chat.encode_completion(prompt, "the thing")
    first = chat.completion(letters, [-1.0] * len(letters), "stop", None)
    assert first.text == "the"
    assert chat.encode_completion(prompt, first.text) != letters
    group = Group(prompt, chat.encode_prompt(prompt), (first, Completion("the thing", whole)))
    selection = select_pairs(BestVsWorst(), [group], [Judgement(prompt.id, (1.0, 0.0))])
    write_records(tmp_path / "pairs.jsonl", selection.pairs, PreferencePair)
    pairs = read_records(tmp_path / "pairs.jsonl", PreferencePair)
    for shared in (True, False):
        assert trained_ids(pairs, shared=shared) == [[letters, whole]]


def test_what_an_engine_sampled_is_what_the_packs_teach(tiny: Path, chat: Chat) -> None:
    prompts = [Prompt(str(n), (Message("user", text),), gold="the end") for n, text in enumerate(("Hi", "Sing, then?"))]
    settings = EngineSettings("transformers", str(tiny), dtype="float32", stop_token_ids=chat.stop_token_ids)
    with EngineGenerator(settings, chat, isolate=False) as generator:
        groups = generator.generate(prompts, Sampling(num_completions=3, max_tokens=12, seed=3))
    assert all(group.prompt_token_ids == chat.encode_prompt(group.prompt) for group in groups)
    # a random model rarely writes canonical tokens: the property would be empty otherwise
    again = [chat.encode_completion(g.prompt, c.text) for g in groups for c in g.completions]
    assert again != [c.token_ids for g in groups for c in g.completions]
    pairs = [make_pair(g, chosen=0, rejected=2, judgement=Judgement(g.prompt.id, (1.0, 0.0, 0.5))) for g in groups]
    assert trained_ids(pairs) == [[g.completions[0].token_ids, g.completions[2].token_ids] for g in groups]
    assert [p.prompt_token_ids for p in pairs] == [g.prompt_token_ids for g in groups]


def test_the_gold_answer_is_trained_on_up_to_its_end_token(chat: Chat) -> None:
    prompt = Prompt(prompt_id(MESSAGES), MESSAGES, gold="the end")
    group = Group(prompt, chat.encode_prompt(prompt), (Completion("no", (80, 81, 1)),), chat.encode_gold(prompt))
    (pair,) = GoldVsCompletion().select(group, None)
    ((gold, _),) = trained_ids([pair])
    assert gold[-1] == chat.tokenizer.eos_token_id
    assert chat.tokenizer.decode(gold) == "the end<|end|>"


def test_each_target_is_predicted_from_the_place_before_it() -> None:
    pairs = random_pairs()
    for shared in (True, False):
        for pack in build_packs(pairs, range(len(pairs)), max_pack_tokens=100, shared=shared):
            flat_ids, flat_positions = pack.input_ids_RT.flatten(), pack.position_ids_RT.flatten()
            target_positions = {}
            for place, target, sequence in zip(pack.predict_N, pack.target_N, pack.sequence_N, strict=True):
                position = int(flat_positions[place]) + 1
                expected = target_positions.setdefault(int(sequence), position)
                assert position == expected
                target_positions[int(sequence)] += 1
                following = (pack.branch_RT.flatten() == sequence) & (flat_positions == position)
                assert flat_ids[following].tolist() == [int(target)]
    assert torch.is_tensor(pack.target_N)
