"""How pairs become steps and packs: nothing lost, nothing split, nothing that sees what it may not."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import pair_of, random_pairs

from selfplay.train.logps import attention_mask
from selfplay.train.pack import NO_BRANCH, PADDING, Pack, build_packs
from selfplay.train.steps import form_steps
from selfplay.types import PreferencePair, derive_seed

TOKENS = st.lists(st.integers(2, 9), min_size=1, max_size=6).map(tuple)


@st.composite
def pair_lists(draw: st.DrawFn) -> list[PreferencePair]:
    """Pairs of few prompts, completions shared between them."""
    prompts = draw(st.lists(TOKENS, min_size=1, max_size=4, unique=True))
    pairs = []
    for prompt in prompts:
        completions = draw(st.lists(TOKENS.map(lambda ids: (*ids, 1)), min_size=2, max_size=4, unique=True))
        edges = st.tuples(st.sampled_from(completions), st.sampled_from(completions)).filter(lambda e: e[0] != e[1])
        pairs += [pair_of(prompt, c, r) for c, r in draw(st.lists(edges, min_size=1, max_size=4))]
    return draw(st.permutations(pairs))


def sequences(pack: Pack) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, completion) of every sequence, read back from the rows."""
    found = {}
    for row in range(pack.input_ids_RT.shape[0]):
        ids, positions = pack.input_ids_RT[row], pack.position_ids_RT[row]
        segments, branches = pack.segment_RT[row], pack.branch_RT[row]
        for sequence in {int(b) for b in branches if b >= 0}:
            own = branches == sequence
            (segment,) = {int(s) for s in segments[own]}
            prompt = (segments == segment) & (branches == NO_BRANCH)
            assert positions[prompt].tolist() == list(range(int(prompt.sum())))
            assert positions[own].tolist() == list(range(int(prompt.sum()), int(prompt.sum() + own.sum())))
            found[sequence] = (tuple(ids[prompt].tolist()), tuple(ids[own].tolist()))
    return found


@given(pair_lists(), st.integers(1, 60), st.booleans())
def test_every_pair_is_in_one_pack_with_its_own_tokens(pairs: list[PreferencePair], cap: int, shared: bool) -> None:
    packs = build_packs(pairs, range(len(pairs)), max_pack_tokens=cap, shared=shared)
    assert sorted(i for pack in packs for i in pack.pair_B) == list(range(len(pairs)))
    for pack in packs:
        held = sequences(pack)
        assert pack.rejected_B is not None
        assert sorted(held) == list(range(pack.num_sequences))
        for place, index in enumerate(pack.pair_B):
            pair = pairs[index]
            assert held[int(pack.chosen_B[place])] == (pair.prompt_token_ids, pair.chosen_token_ids)
            assert held[int(pack.rejected_B[place])] == (pair.prompt_token_ids, pair.rejected_token_ids)
        targets = {s: tuple(pack.target_N[pack.sequence_N == s].tolist()) for s in held}
        assert targets == {s: completion for s, (_, completion) in held.items()}
        assert pack.lengths_S().tolist() == [len(held[s][1]) for s in range(pack.num_sequences)]
        assert pack.input_ids_RT.shape[0] == (1 if shared else pack.num_sequences)
        assert pack.num_tokens <= cap or len(pack.pair_B) == 1


@given(pair_lists(), st.integers(1, 60), st.integers(1, 30))
def test_the_length_of_a_row_has_a_cap_of_its_own(pairs: list[PreferencePair], cap: int, longest: int) -> None:
    packs = build_packs(pairs, range(len(pairs)), max_pack_tokens=cap, shared=True, max_pack_length=longest)
    assert sorted(i for pack in packs for i in pack.pair_B) == list(range(len(pairs)))
    for pack in packs:
        held = sequences(pack)
        rows, width = pack.input_ids_RT.shape
        assert pack.num_tokens <= cap or rows == 1
        most = max(sum(int(s) >= 0 for s in row) for row in pack.segment_RT)
        assert most == width, "no row is longer than the longest"
        assert width <= longest or len(pack.pair_B) == rows == 1 or width <= max(map(_size, pairs))
        assert sum(sum(part) for part in pack.lengths) == rows * width, "attention is told of every place"
        for place, index in enumerate(pack.pair_B):
            assert held[int(pack.chosen_B[place])] == (pairs[index].prompt_token_ids, pairs[index].chosen_token_ids)
        targets = {s: tuple(pack.target_N[pack.sequence_N == s].tolist()) for s in held}
        assert targets == {s: completion for s, (_, completion) in held.items()}


def _size(pair: PreferencePair) -> int:
    return sum(map(len, (pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids)))


@given(pair_lists(), st.integers(1, 60))
def test_without_a_length_a_pack_is_one_row(pairs: list[PreferencePair], cap: int) -> None:
    for length in (None, cap, cap + 5):
        packs = build_packs(pairs, range(len(pairs)), max_pack_tokens=cap, shared=True, max_pack_length=length)
        assert [len(pack.input_ids_RT) for pack in packs] == [1] * len(packs)


@given(pair_lists())
def test_with_room_a_prompt_and_each_of_its_completions_stand_once(pairs: list[PreferencePair]) -> None:
    (pack,) = build_packs(pairs, range(len(pairs)), max_pack_tokens=10_000, shared=True)
    wanted = Counter((p.prompt_token_ids, ids) for p in pairs for ids in {p.chosen_token_ids, p.rejected_token_ids})
    assert set(sequences(pack).values()) == set(wanted)
    assert pack.num_sequences == len(wanted)
    prompts = {p.prompt_token_ids for p in pairs}
    assert pack.num_tokens == sum(map(len, prompts)) + sum(len(ids) for _, ids in wanted)


def test_what_sees_what_in_a_pack_and_under_a_window() -> None:
    pairs = [pair_of((2, 3), (4, 5), (6,)), pair_of((7,), (8,), (9,))]
    (pack,) = build_packs(pairs, [0, 1], max_pack_tokens=99, shared=True)
    assert pack.input_ids_RT.tolist() == [[2, 3, 4, 5, 6, 7, 8, 9]]
    assert pack.position_ids_RT.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1]]
    sees = ["x.......", "xx......", "xxx.....", "xxxx....", "xx..x...", ".....x..", ".....xx.", ".....x.x"]
    mask = attention_mask(pack, window=None)[0, 0]
    assert ["".join("x" if seen else "." for seen in row) for row in mask] == sees
    # a window of 2 counts positions: token 6 follows the prompt's last token directly, wherever it lies in the pack
    sees = ["x.......", "xx......", ".xx.....", "..xx....", ".x..x...", ".....x..", ".....xx.", ".....x.x"]
    mask = attention_mask(pack, window=2)[0, 0]
    assert ["".join("x" if seen else "." for seen in row) for row in mask] == sees


def test_plain_rows_are_padded_on_the_right_by_length_whatever_the_pad_token_is() -> None:
    (pack,) = build_packs([pair_of((0, 2), (0, 0), (1,))], [0], max_pack_tokens=99, shared=False)
    assert pack.input_ids_RT.tolist() == [[0, 2, 0, 0], [0, 2, 1, 0]]
    assert (pack.segment_RT != PADDING).tolist() == [[True] * 4, [True, True, True, False]]
    assert pack.target_N.tolist() == [0, 0, 1]
    assert pack.predict_N.tolist() == [1, 2, 5]


def test_sums_are_per_sequence() -> None:
    (pack,) = build_packs([pair_of((2, 3), (4, 5), (6,))], [0], max_pack_tokens=99, shared=True)
    assert pack.sum_per_sequence(torch.tensor([-1.0, -2.0, -4.0])).tolist() == [-3.0, -4.0]
    assert pack.to(torch.device("cpu")).pair_B == pack.pair_B


def test_nothing_sees_padding() -> None:
    (pack,) = build_packs(random_pairs(), range(9), max_pack_tokens=10_000, shared=False)
    padding_RT = pack.segment_RT == PADDING
    assert padding_RT.any()
    for window in (None, 4):
        mask_RTT = attention_mask(pack, window=window)[:, 0]
        seen_by_tokens = mask_RTT & padding_RT[:, None, :] & ~padding_RT[:, :, None]
        assert not seen_by_tokens.any()
        # a row that sees nothing at all would be NaN in softmax
        assert mask_RTT.any(-1).all()


@given(pair_lists(), st.integers(1, 5), st.integers(0, 3))
def test_shuffled_steps_hold_every_pair_once_and_whole_prompts(
    pairs: list[PreferencePair], size: int, epoch: int
) -> None:
    steps = form_steps(pairs, batch_size=size, seed=1, epoch=epoch, shuffle=True)
    assert sorted(i for step in steps for i in step) == list(range(len(pairs)))
    for step in steps[:-1]:
        assert len(step) >= size
    prompts = [{pairs[i].prompt_token_ids for i in step} for step in steps]
    assert sum(map(len, prompts)) == len({p.prompt_token_ids for p in pairs})
    for step in steps:
        last = pairs[step[-1]].prompt_token_ids
        assert len([i for i in step if pairs[i].prompt_token_ids != last]) < size, "overshoots by more than one prompt"


@given(pair_lists(), st.integers(1, 5), st.integers(0, 3))
def test_shuffled_steps_are_those_of_a_shuffled_list_of_prompts(
    pairs: list[PreferencePair], size: int, epoch: int
) -> None:
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt_token_ids, []).append(index)
    prompts = list(by_prompt.values())
    random.Random(derive_seed(1, "epoch", epoch)).shuffle(prompts)
    steps: list[list[int]] = []
    for indices in prompts:
        if not steps or len(steps[-1]) >= size:
            steps.append([])
        steps[-1] += indices
    assert form_steps(pairs, batch_size=size, seed=1, epoch=epoch, shuffle=True) == steps


@given(pair_lists(), st.integers(1, 5))
def test_unshuffled_steps_cut_the_files_order(pairs: list[PreferencePair], size: int) -> None:
    steps = form_steps(pairs, batch_size=size, seed=1, epoch=0, shuffle=False)
    assert [i for step in steps for i in step] == list(range(len(pairs)))
    assert all(len(step) == size for step in steps[:-1])
    assert 0 < len(steps[-1]) <= size


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    pairs = random_pairs(num_prompts=12, num_completions=2)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return list(form_steps(pairs, batch_size=3, seed=seed, epoch=epoch, shuffle=True))

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


@pytest.mark.parametrize("shared", [True, False])
def test_packs_of_some_pairs_hold_those_alone(shared: bool) -> None:
    pairs = random_pairs()
    packs = build_packs(pairs, [7, 2], max_pack_tokens=1000, shared=shared)
    assert sorted(i for pack in packs for i in pack.pair_B) == [2, 7]
