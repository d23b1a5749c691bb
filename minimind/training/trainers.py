"""Narrow subclasses of the libraries' trainers; each is tested to give the stock trainer's loss."""

from transformers import Trainer
from trl import SFTTrainer


class ChatSFTTrainer(SFTTrainer):
    """Identical to TRL's except: the loss is the model's own.

    TRL projects through the head in tiles and in Python, which saves memory at vocabularies of 100,000 and more; at
    6,400 on a CPU it costs most of a step (benchmarks/sft_step.py). The price: entropy and token accuracy are not
    logged.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False  # with a cache, position_ids that restart would not keep conversations apart
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
