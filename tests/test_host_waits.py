"""In a step of pretraining the host waits for the device nowhere, so that the device always has
work: nothing is read from it but what is shown or saved, and what the guard reads a step late.

On a CPU nothing waits, so the reads themselves are noted. tests/test_gpu.py asks CUDA.
"""

import traceback
from contextlib import ExitStack, contextmanager

import pytest
from small_run import small_trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from minimind import MiniMindConfig
from minimind.model import modeling_minimind

# Operators whose result, or its shape, the host needs
READING_OPERATORS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
READING_OPERATORS |= {"_unique2", "unique_consecutive", "unique_dim", "bincount"}
READING_METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"}


class Operators(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in READING_OPERATORS:
            self.note(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING_METHODS:
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def noted_reads():
    """The functions that read from a tensor, innermost first, by name."""
    reads = []

    def note(name):
        stack = [f.name for f in traceback.extract_stack() if f.filename != __file__]
        reads.append(f"{name} in {' < '.join(stack[:-4:-1])}")

    with ExitStack() as modes:
        modes.enter_context(Operators(note))
        modes.enter_context(Methods(note))
        yield reads


class Watch(TrainerCallback):
    """Notes the reads from the beginning of the second step to the end of the third."""

    def __init__(self):
        self.stack, self.reads = ExitStack(), None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.reads = self.stack.enter_context(noted_reads())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.stack.close()


def reads_of(trainer):
    trainer.callback_handler.callbacks.remove(trainer.witness)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    # The guard reads what has arrived on the host
    return [read for read in watch.reads if not read.startswith("tolist in _read < on_optimizer")]


@pytest.fixture(autouse=True)
def attention_as_elsewhere(monkeypatch):
    """The route that attention takes on other devices than a CPU."""
    monkeypatch.setattr(modeling_minimind, "blocks_are_faster", lambda query, key: False)


QUIET = {"logging_steps": 100, "logging_first_step": False}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"optim": "muon"}])
def test_a_step_reads_nothing_from_the_device(make_trainer, options):
    assert reads_of(make_trainer(**options, **QUIET)) == []


def test_a_step_of_a_mixture_of_experts_reads_nothing(config, tokenizer, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = MiniMindConfig(**config.to_dict() | experts)
    trainer = small_trainer(config, tokenizer, tmp_path / "run", **QUIET)
    trainer.model.set_experts_implementation("grouped_mm")  # which "fastest" is elsewhere
    assert reads_of(trainer) == []


def test_a_log_reads_once_and_packed_documents_once_in_each_forward(make_trainer):
    trainer = make_trainer(document_mask=True, logging_steps=2, logging_first_step=False)
    trainer.data_collator.document_mask = True
    names = [read.split(" < ")[0] for read in reads_of(trainer)]
    assert names.count("item in _read_tokens") == 1
    # The library looks whether any row has several documents (find_packed_sequence_indices)
    assert names.count("__bool__ in find_packed_sequence_indices") == 2


@pytest.mark.parametrize(("which", "per_row"), [("non_padding", 12), ("all", 16), ("no", 0)])
def test_tokens_are_counted_in_every_micro_batch(make_trainer, tokenizer, which, per_row):
    trainer = make_trainer(
        include_num_input_tokens_seen=which, gradient_accumulation_steps=2, logging_steps=4
    )
    padding = [tokenizer.pad_token_id] * 4
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {"input_ids": [*row["input_ids"][4:], *padding]}
    )
    trainer.train()
    rows = trainer.state.max_steps * 2 * trainer.args.per_device_train_batch_size
    assert trainer.state.num_input_tokens_seen == rows * per_row
