"""The processes of a run take the rows that a single one would take."""

import itertools

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from minimind.training.dataloaders import SharedBatches, share_last_rows


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 3), (2, 3), (2, 1), (4, 2), (3, 4)])
def test_every_row_of_an_epoch_is_taken_once_and_in_the_step_of_a_single_process(
    processes, micro_batch
):
    for rows in range(1, 40):
        inner = BatchSampler(range(rows), micro_batch, drop_last=False)
        shards = [list(SharedBatches(inner, processes, rank)) for rank in range(processes)]
        lengths = {len(SharedBatches(inner, processes, rank)) for rank in range(processes)}
        assert {len(shard) for shard in shards} == lengths
        taken = [[row for shard in step for row in shard] for step in zip(*shards, strict=True)]
        size = processes * micro_batch
        expected = [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]
        if len(expected[-1]) < processes:  # somebody has to take a row that another has too
            assert set(taken.pop()) == set(expected.pop())
        assert taken == expected


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batches_pass_unchanged_through_the_sampler_of_accelerate(drop_last):
    for rows, processes in itertools.product(range(1, 20), (2, 3)):
        for rank in range(processes):
            inner = BatchSampler(range(rows), 3, drop_last)
            shard = BatchSamplerShard(inner, processes, rank)
            share_last_rows(shard)
            expected = SharedBatches(inner, processes, rank)
            assert list(shard) == list(expected)
            assert len(shard) == len(expected) == len(BatchSamplerShard(inner, processes, rank))
            assert shard.batch_sampler.sampler is inner.sampler  # whose epoch accelerate sets
