"""Which training images a process sees, and in what order."""

from collections.abc import Iterator
from itertools import islice

from dynamicvit.utils import derive_seed
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler


class TrainSampler(Sampler):
    """One process's share of an epoch, shuffled, as (index, seed of its augmentation).

    Order and seeds depend on (seed, epoch, position) alone, so a resumed run can start in the middle of an epoch.
    num_repeats > 1 is DeiT's repeated augmentation: the same images in several processes or
    batches, each time augmented anew.
    """

    def __init__(self, dataset: Dataset, rank: int, world_size: int, seed: int, num_repeats: int = 1) -> None:
        kwargs = {"num_replicas": world_size, "rank": rank, "shuffle": True}
        if num_repeats > 1:
            # older timm rounds the length down to a multiple of 256 even where that leaves nothing
            selected_round = 256 if len(dataset) >= 256 else 0
            self.order = RepeatAugSampler(dataset, num_repeats=num_repeats, selected_round=selected_round, **kwargs)
        else:
            self.order = DistributedSampler(dataset, **kwargs)
        self.rank = rank
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """start: how many images at the beginning of this process's share to leave out."""
        self.epoch = epoch
        self.start = start
        self.order.set_epoch(derive_seed(self.seed, epoch))

    def __len__(self) -> int:
        return len(self.order) - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(islice(iter(self.order), self.start, None), self.start):
            yield index, derive_seed(self.seed, self.epoch, self.rank, position)
