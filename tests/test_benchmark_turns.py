"""The benchmarks' turns: what a micro-batch of a script is said to hold."""

import pytest

from benchmarks.turns import Program, take_turns

TRAINER = """
import torch
from types import SimpleNamespace
from transformers import Trainer, TrainingArguments, Qwen3Config, Qwen3ForCausalLM

model = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=8,
))
row = {"input_ids": torch.tensor([1, 2, 3, 0]), "labels": torch.tensor([1, -100, 3, -100])}
args = TrainingArguments(
    "run", per_device_train_batch_size=2, max_steps=9, report_to="none", use_cpu=True,
    dataloader_pin_memory=False, save_steps=2, disable_tqdm=True,
)
trainer = Trainer(model, args, train_dataset=[row] * 18)
trainer.processing_class = SimpleNamespace(pad_token_id=0, save_pretrained=lambda *_: None)
trainer.train()
"""


@pytest.mark.slow
def test_a_report_counts_the_tokens_of_its_micro_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TRAINER)
    program = Program("trainer", [script], tmp_path)
    take_turns([program], rounds=3, between=lambda: None)
    # Two rows: three tokens each are not padding, and of three targets one has a label
    assert [(r["tokens"], r["trained"], r["rows"]) for r in program.reports] == [(6, 2, 2)] * 3
    parts = ("forward", "backward", "optimizer")
    assert all(0 < sum(r[part] for part in parts) < r["seconds"] for r in program.reports)
    assert [r["saving"] > 0 for r in program.reports] == [False, True, False]
    assert program.startup > 0 and program.process.poll() is not None


@pytest.mark.slow
def test_a_script_that_fails_ends_the_benchmark_with_its_last_lines(tmp_path):
    script = tmp_path / "trainer" / "train_nothing.py"  # without the libraries, which take seconds
    script.parent.mkdir()
    script.write_text("raise OSError('no such corpus')")
    with pytest.raises(RuntimeError, match="no such corpus"):
        Program("broken", [script], tmp_path)
