"""The trainer of reward models: TRL's loss on rows in which prompts are shared, and a held-out
evaluation of every pair."""

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardTrainer

from minimind.data.preference_batches import PreferenceCollator, visible_tokens
from minimind.evaluation import pair_metrics
from minimind.training.trainers import ScheduledTrainer

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"]


class PackedRewardTrainer(RewardTrainer):
    """Identical to TRL's except: it computes on the packed rows of a batch, in which a pair has its
    prompt once (see preference_batches.py); the rewards are those of two sequences.

    In training a mixture of experts adds `router_aux_loss_coef` times its load-balancing loss,
    which TRL leaves out; a shared token counts once.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            lambda **batch: on_packed_rows(model, batch), inputs, return_outputs=True
        )
        if self.model.training and outputs.aux_loss is not None:
            config = self.accelerator.unwrap_model(self.model).config
            loss = loss + config.router_aux_loss_coef * outputs.aux_loss
            self._metrics["train"]["aux_loss"].append(outputs.aux_loss.item())
        return (loss, outputs) if return_outputs else loss


class RewardModelTrainer(ScheduledTrainer, PackedRewardTrainer):
    """For rows of `load_preferences`. Identical to TRL's except for the packed rows and:

    It takes token ids, where TRL would tokenise texts and take control tokens in somebody's words
    for real ones.

    Held-out metrics are those of all pairs, see `pair_metrics`. TRL's are means of its batches'.
    """

    # TRL gathers the rewards of a micro-batch, of which every process needs as many
    shares_last_rows = False

    def __init__(self, *, model: PreTrainedModel, args, processing_class, **kwargs):
        collator = PreferenceCollator(
            processing_class.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
            packed=True,
            # Flash attention knows no such mask
            share_prompts=model.config._attn_implementation == "sdpa",
        )
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = COLUMNS

    # Held-out pairs

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        dataset = dataloader.dataset
        metrics = pair_metrics(self.pair_rewards(dataset), reply_lengths(dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(dataset))

    @torch.no_grad()
    def pair_rewards(self, dataset: Dataset) -> np.ndarray:
        """The rewards (pairs, 2) of the chosen and the rejected reply of each row, each process
        computing its share."""
        world, rank, size = (
            self.args.world_size,
            self.args.process_index,
            self.args.per_device_eval_batch_size,
        )
        mine = list(range(rank, len(dataset), world))
        # As many batches as the other processes: ZeRO-3 gathers the weights in each of them
        mine += [0] * (-(-len(dataset) // world) - len(mine))

        training, found = self.model.training, []
        self.model.eval()
        for start in range(0, len(mine), size):
            rows = [dataset[index] for index in mine[start : start + size]]
            batch = self._prepare_inputs(self.data_collator(rows))
            with self.compute_loss_context_manager():
                scores = on_packed_rows(self.model, batch | {"use_cache": False}).logits
            found.append(torch.stack(scores.squeeze(-1).chunk(2), dim=1).cpu().numpy())
        self.model.train(training)

        rewards = np.empty((len(dataset), 2), dtype=np.float32)
        for index, share in enumerate(gather_object([np.concatenate(found)])):
            count = len(range(index, len(dataset), world))
            rewards[index::world] = share[:count]
        return rewards


def on_packed_rows(model: nn.Module, batch: dict[str, torch.Tensor]):
    """The outputs of a reward model for TRL's batch of (2 * pairs, S), computed on its packed rows:
    `logits` (2 * pairs, 1) in fp32, the chosen replies first."""
    core = getattr(model, "module", model)  # of a wrapper for several processes
    outputs = model(
        input_ids=batch["packed_ids"],
        position_ids=batch["packed_positions"],
        attention_mask=(
            visible_tokens(batch["packed_parts"])
            if core.config._attn_implementation == "sdpa"
            else None
        ),
        last_tokens=batch["packed_ends"],
        use_cache=False,
    )
    outputs.logits = outputs.logits.float()
    return outputs


def reply_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens (pairs, 2) of the chosen and the rejected reply of each row."""
    names = ("chosen_ids", "rejected_ids")
    return np.array([[len(row[name]) for name in names] for row in dataset], dtype=int)
