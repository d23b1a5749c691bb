"""Narrow subclasses of the libraries' trainers; each is tested to give the stock trainer's loss."""

from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from minimind.training.resume import ResumableTrainer


class BlockTrainer(ResumableTrainer):
    """Identical to the library's except: held-out loss is the mean over targets, also where rows have different
    numbers of them. The library takes the mean of each batch, and then of the batches.

    `eval_counts`: "targets" and "blocks" of the held-out rows, see `documents.load_blocks`.
    """

    def __init__(self, *args, eval_counts: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_counts = eval_counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training and self.eval_counts:
            # The library multiplies by the processes and weighs the batch by its rows: divide by these rows' share.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            rows = len(inputs["input_ids"]) * processes
            num_items_in_batch = rows * self.eval_counts["targets"] / self.eval_counts["blocks"]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class ChatSFTTrainer(ResumableTrainer, SFTTrainer):
    """Identical to TRL's except: the loss is the model's own.

    TRL projects through the head in tiles and in Python, which saves memory at vocabularies of 100,000 and more; at
    6,400 on a CPU it costs most of a step (benchmarks/sft_step.py). The price: entropy and token accuracy are not
    logged.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False  # with a cache, position_ids that restart would not keep conversations apart
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class PreferenceTrainer(ResumableTrainer, DPOTrainer):
    """TRL's, made resumable."""
