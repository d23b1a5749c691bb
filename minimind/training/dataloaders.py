"""The rows of each step: the same however often a run was interrupted and however many processes
share them."""

from collections.abc import Iterator
from functools import partial

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from minimind.training.signals import start_worker


class LoadingTrainer(Trainer):
    """Mixed into the libraries' trainers; identical to them except: rows grouped by length have the
    same order in a resumed run, the processes share the last rows of an epoch, and dataloader
    workers outlive the signals that are meant for the run."""

    shares_last_rows = True

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper uses this one
        inner.worker_init_fn = partial(start_worker, inner.worker_init_fn)
        return loader

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.shares_last_rows:
            share_last_rows(getattr(loader, "batch_sampler", None))
        return loader

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        is_grouped = isinstance(sampler, LengthGroupedSampler)
        return SeededEpochs(sampler, self.args.seed) if is_grouped else sampler


class SeededEpochs(Sampler):
    """A sampler whose order depends on seed and epoch alone, not on the random numbers drawn
    before."""

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self):
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


class SharedBatches(BatchSamplerShard):
    """Identical to accelerate's except: the rows left over at the end of an epoch are divided among
    the processes, where accelerate fills each micro-batch up with rows from the epoch's beginning.

    So every step takes the rows that one process would take. (Of fewer rows than processes some
    take the first one too.)
    """

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for batch in self.batch_sampler:
            batches.append(batch)
            if len(batches) == self.num_processes and len(batch) == self.batch_size:
                yield batches[self.process_index]
                batches = []
        rows = [row for batch in batches for row in batch]
        if rows and not self.drop_last:
            ends = [
                len(rows) * (self.process_index + offset) // self.num_processes for offset in (0, 1)
            ]
            yield rows[slice(*ends)] or rows[:1]

    @property
    def sampler(self) -> Sampler:
        """The order of the rows, which accelerate looks for here to set its epoch."""
        return self.batch_sampler.sampler


def share_last_rows(shard) -> None:
    """Put `SharedBatches` into the sampler that accelerate made for one of several processes.

    A DataLoader lets nobody exchange its sampler. So accelerate's stays, and passes on the batches
    of ours, as the only process would, in the way that transformers does for a sampler of its own.
    """
    if (
        type(shard) is BatchSamplerShard
        and type(shard.batch_sampler) is BatchSampler
        and not shard.split_batches
    ):
        shard.batch_sampler = SharedBatches(
            shard.batch_sampler,
            shard.num_processes,
            shard.process_index,
            even_batches=shard.even_batches,
        )
        shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
