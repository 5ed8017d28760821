"""The pairs of a step dealt over the processes that train, and the packs that each of them runs.

Every process deals for itself and comes to the same result. Pairs of one prompt stay together where they fit one pack, and
each process gets about the same number of tokens. Processes whose weights are sharded must run equally often, since each
forward pass exchanges layers: a process with fewer packs runs a small one again, with weight 0.
"""

from collections.abc import Sequence

from selfplay.train.pack import Pack, build_packs, units
from selfplay.train.world import World
from selfplay.types import TrainRow


def deal(
    pairs: Sequence[TrainRow],
    indices: Sequence[int],
    *,
    max_pack_tokens: int,
    shared: bool,
    size: int,
    max_pack_length: int | None = None,
) -> list[list[int]]:
    """The indices of each of `size` processes, in the order of `indices`: the largest unit first, always to the process with
    the fewest tokens so far. No unit is larger than a pack, so two processes differ by at most one unit.
    """
    if size == 1:
        return [list(indices)]
    loads = [0] * size
    taken: list[set[int]] = [set() for _ in range(size)]
    parts = units(pairs, indices, max_pack_tokens=max_pack_tokens, max_pack_length=max_pack_length, shared=shared)
    for tokens, members in sorted(parts, key=lambda unit: -unit[0]):
        least = loads.index(min(loads))
        loads[least] += tokens
        taken[least].update(members)
    return [[index for index in indices if index in one] for one in taken]


def own_packs(
    world: World,
    pairs: Sequence[TrainRow],
    indices: Sequence[int],
    *,
    max_pack_tokens: int,
    max_pack_length: int | None,
    shared: bool,
) -> list[tuple[Pack, float]]:
    """(pack, weight) of this process; weight 0 marks a dummy. At least one, so that every process has gradients and metrics.

    Where weights are sharded the number is the same in all processes, which asks them.
    """
    cap, longest = max_pack_tokens, max_pack_length
    shares = deal(pairs, indices, max_pack_tokens=cap, max_pack_length=longest, shared=shared, size=world.size)
    packs = build_packs(pairs, shares[world.rank], max_pack_tokens=cap, max_pack_length=longest, shared=shared)
    wanted = world.most(len(packs))[0] if world.sharding is not None else max(1, len(packs))
    dummies: list[tuple[Pack, float]] = []
    if len(packs) < wanted:
        shortest = min(indices, key=lambda i: len(pairs[i].prompt_token_ids) + sum(map(len, pairs[i].completions)))
        dummy = build_packs(pairs, [shortest], max_pack_tokens=cap, max_pack_length=longest, shared=shared)[0]
        dummies = [(dummy, 0.0)] * (wanted - len(packs))
    return [*((pack, 1.0) for pack in packs), *dummies]
