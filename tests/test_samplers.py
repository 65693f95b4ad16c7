"""Which images each process sees: all of them, once (or three times), in a new order every epoch."""

from collections import Counter
from itertools import pairwise

import pytest
from dynamicvit.samplers import TrainSampler


def epoch_of(size: int, world_size: int, *, epoch: int = 0, start: int = 0, repeats: int = 1) -> list[list[tuple]]:
    """The (index, seed) pairs of every rank."""
    shares = []
    for rank in range(world_size):
        sampler = TrainSampler(range(size), rank, world_size, seed=5, num_repeats=repeats)
        sampler.set_epoch(epoch, start)
        share = list(sampler)
        assert len(sampler) == len(share)
        shares.append(share)
    return shares


def indices(shares: list[list[tuple]]) -> list[int]:
    """In the order of the global batch: the first of every rank, the second of every rank, ..."""
    return [index for position in zip(*shares, strict=True) for index, _ in position]


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (100, 1), (100, 4), (12, 3), (300, 2)])
def test_every_image_once(size: int, world_size: int) -> None:
    assert sorted(indices(epoch_of(size, world_size))) == list(range(size))


@pytest.mark.parametrize(("size", "world_size", "padding"), [(10, 3, 2), (7, 4, 1), (100, 8, 4), (2, 4, 2)])
def test_padding_only_where_sizes_do_not_divide(size: int, world_size: int, padding: int) -> None:
    shares = epoch_of(size, world_size)
    seen = indices(shares)
    assert {len(share) for share in shares} == {(size + padding) // world_size}
    assert set(seen) == set(range(size))
    assert len(seen) == size + padding


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 2), (100, 1), (100, 4), (300, 2), (1000, 8)])
def test_repeats(size: int, world_size: int) -> None:
    """An epoch is as long as ever, and shows each of its images three times (the last one: what fits)."""
    shares = epoch_of(size, world_size, repeats=3)
    counts = Counter(indices(shares))
    # DeiT's rounding: from 256 images on, a multiple of 256
    total = size if size < 256 else size // 256 * 256
    assert sum(counts.values()) == total
    assert sorted(counts.values(), reverse=True) == [3] * (total // 3) + [total % 3] * (total % 3 > 0)
    assert set(counts) <= set(range(size))


def test_repeats_spread_over_the_processes() -> None:
    for share in epoch_of(99, 3, repeats=3):
        assert len({index for index, _ in share}) == 33  # each process sees an image once


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("size", [10, 100])
def test_another_epoch_another_order(size: int, repeats: int) -> None:
    orders = [indices(epoch_of(size, 1, epoch=epoch, repeats=repeats)) for epoch in range(4)]
    assert all(a != b for a, b in pairwise(orders))
    assert orders[2] == indices(epoch_of(size, 1, epoch=2, repeats=repeats))
    assert orders[0] != sorted(orders[0])  # shuffled at all


def test_another_seed_another_order() -> None:
    first, other, again = ([index for index, _ in TrainSampler(range(50), 0, 1, seed)] for seed in (0, 1, 0))
    assert first == again != other


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [1, 3])
def test_start_goes_on_where_it_would_have_been(world_size: int, repeats: int) -> None:
    whole = epoch_of(40, world_size, epoch=2, repeats=repeats)
    for start in (0, 1, 7):
        rest = epoch_of(40, world_size, epoch=2, start=start, repeats=repeats)
        assert rest == [share[start:] for share in whole]


def test_next_epoch_starts_at_its_beginning() -> None:
    sampler = TrainSampler(range(10), 0, 1, seed=5)
    sampler.set_epoch(0, start=4)
    assert len(list(sampler)) == 6
    sampler.set_epoch(1)
    assert [list(sampler)] == epoch_of(10, 1, epoch=1)


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_augmentation_has_its_own_seed(repeats: int) -> None:
    seeds = [seed for epoch in range(3) for share in epoch_of(40, 2, epoch=epoch, repeats=repeats) for _, seed in share]
    assert len(seeds) == 3 * 40 and len(set(seeds)) == len(seeds)


def test_processes_augment_the_same_image_differently() -> None:
    """With repeated augmentation, the copies of an image go to different processes at the same time."""
    first, second = epoch_of(20, 2, repeats=3)
    together = [(a, b) for a, b in zip(first, second, strict=True) if a[0] == b[0]]
    assert together and all(a[1] != b[1] for a, b in together)
