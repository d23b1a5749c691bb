"""Memory that grows is noticed, a cache that fills is not."""

import mmap

import pytest
from transformers import TrainerCallback

from minimind.training import memory_growth
from minimind.training.memory_growth import MemoryCallback, growth

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def test_growing_memory_is_noticed_and_a_filling_cache_is_not():
    leak = [(step, 1e9 + step * 20e6) for step in range(30)]
    assert growth(leak) == pytest.approx(400e6)
    assert growth([(step, 1e9 + min(step, 8) * 60e6) for step in range(30)]) == 0
    assert growth([(step, 1e9 + (step % 2) * 500e6) for step in range(30)]) == 0
    assert growth([(step, 10e9 + step * 20e6) for step in range(30)]) == 0  # 4 % of what there was


def test_the_memory_watch_reads_the_real_memory_of_the_process(make_trainer, monkeypatch, capsys):
    monkeypatch.setattr(memory_growth, "SAMPLES", 6)
    monkeypatch.setattr(memory_growth, "GROWN_BYTES", 20e6)
    monkeypatch.setattr(memory_growth, "GROWTH", 0.0)
    held, private = [], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

    class Leak(TrainerCallback):
        def on_log(self, *args, **kwargs):
            # A tensor may get pages that were freed before
            held.append(mmap.mmap(-1, 20_000_000, flags=private))
            held[-1].write(b"1" * 20_000_000)

    trainer = make_trainer(guarded=False, max_steps=8)
    trainer.add_callback(Leak())
    trainer.add_callback(MemoryCallback())
    trainer.train()
    said = capsys.readouterr().err
    assert "the memory of the process has grown by" in said
    assert 60 < float(said.split("grown by ")[1].split(" MB")[0]) < 100  # four logs of 20 MB
