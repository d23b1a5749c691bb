"""The rows of each step: the same however often a run was interrupted and however many processes
share them. No step waits for them on the device."""

from collections.abc import Iterator
from functools import partial

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from minimind.training.signals import start_worker


class LoadingTrainer(Trainer):
    """Mixed into the libraries' trainers; identical to them except:

    Rows grouped by length have the same order in a resumed run, the processes share the last rows
    of an epoch, and dataloader workers outlive the signals that are meant for the run.

    On CUDA the host prepares the next step while the device computes. The library waits for the
    device when it copies a batch and when it counts the tokens of one. Here copies from pinned
    memory wait for nothing, and the counts stay on the device until they are shown or saved.
    """

    shares_last_rows = True
    unread_tokens: torch.Tensor | int = 0  # of this process, since `_read_tokens`

    def _track_num_input_tokens(self, inputs: dict) -> None:
        which, ids = self.args.include_num_input_tokens_seen, inputs.get("input_ids")
        if which == "no" or ids is None:
            return
        pad_token_id = getattr(self.processing_class, "pad_token_id", None)
        if which == "all" or ("attention_mask" not in inputs and pad_token_id is None):
            tokens = ids.numel()
        else:
            tokens = inputs.get("attention_mask", ids != pad_token_id).sum()
        self.unread_tokens = self.unread_tokens + tokens

    def _read_tokens(self) -> None:
        """Add what was counted to the state; all processes call it together."""
        counts = torch.as_tensor(self.unread_tokens, dtype=torch.int64, device=self.args.device)
        self.state.num_input_tokens_seen += self.accelerator.gather(counts).sum().item()
        self.unread_tokens = 0

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate:
            self._read_tokens()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._read_tokens()
        return super()._finalize_training(*args, **kwargs)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        if self.args.device.type == "cuda" and self.args.dataloader_pin_memory:
            self.accelerator.dataloader_config.non_blocking = True
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
