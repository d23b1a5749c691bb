"""The trainers of the stages: narrow subclasses of the libraries', each tested to compute their
loss."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer
from trl import SFTTrainer, pack_dataset

from minimind.common.bounds import MOST
from minimind.common.errors import UserError, decoration
from minimind.data.packing import IGNORED, PackedCollator, PaddedCollator
from minimind.evaluation import bits_per_byte
from minimind.stage_directory import virtual_tokens
from minimind.training.checkpointing_trainer import CheckpointingTrainer
from minimind.training.dataloaders import LoadingTrainer
from minimind.training.eval_pairs import pair_metrics
from minimind.training.optimizers import build_optimizer
from minimind.training.schedules import schedule_options, steps_on_time
from minimind.training.time_budget import TimeBudget


def weighted_causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    loss_weights: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """sum(w * -log p) / num_items_in_batch over trained tokens: logits (B, S, V), or (N, V) of N
    `positions` in 0 .. B * S alone, labels and loss_weights (B, S)."""
    targets = pad(labels[..., 1:], (0, 1), value=IGNORED).reshape(-1)
    weights = pad(loss_weights[..., 1:], (0, 1)).reshape(-1)
    if positions is not None:
        targets, weights = targets[positions], weights[positions]
    losses = cross_entropy(
        logits.view(-1, vocab_size).float(), targets, ignore_index=IGNORED, reduction="none"
    )
    return (weights * losses).sum() / num_items_in_batch


def warmed_up(step: int, factor: Callable[[int], float], warmup_steps: int) -> float:
    """Factor of the learning rate at a step, counted from 0.

    It is the library's `factor`, but a step ahead while it warms up from 0, so that step k of w has
    (k + 1) / w of the peak.
    """
    if step >= warmup_steps or factor(0) > 0:
        return factor(step)
    return factor(step + 1) if step + 1 < warmup_steps else 1.0


class ScheduledTrainer(CheckpointingTrainer, LoadingTrainer):
    """Mixed into the libraries' trainers, first of their bases; identical to them except for the
    mix-ins above and:

    The first step's learning rate is above 0, and the last step of the warm-up has the peak. The
    library's first step has rate 0 and trains nothing, so a run of one step would not train at all.
    What follows the warm-up is the same.

    The length of the decay of `warmup_stable_decay` may be a share of all steps,
    `--lr_decay_steps`, as that of the warm-up may.

    Under `--time_budget` the schedule runs on time, epochs repeat without end, and the callback
    `time_budget` ends the run; see `TimeBudget`.

    The shares of `--eval_pairs` that the model wins join each evaluation.

    An upload that fails does not end a run. `init_hf_repo` fails before the first step.

    Raises:
        UserError: (from the constructor) options that do not fit together, which the libraries
            refuse.
    """

    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, ImportError, NotImplementedError) as error:
            raise UserError(f"the options do not fit together: {error}") from error
        if getattr(self.args, "time_budget", None):
            self.time_budget = TimeBudget(self)
        router_coef = getattr(self.args, "router_aux_loss_coef", None)
        if router_coef and not getattr(self.model.config, "num_experts", 0):
            raise UserError(
                "--router_aux_loss_coef is about experts, and the model has none. Leave it out."
            )

    def init_hf_repo(self, *args, **kwargs):
        """The library's; raises UserError where the Hub or the login fails."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--push_to_hub: the repository cannot be opened ({reason}). Log in with `hf auth"
                " login` and look at the network; or train without it, and upload the finished"
                " directory with `minimind push`."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with decoration("the upload to the Hub"):
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        with decoration("the upload to the Hub"):
            super()._finish_current_push()

    def create_model_card(self, *args, **kwargs):
        """No form with empty fields, as TRL's is: `Stage.finish` writes the model card."""

    def create_optimizer(self, model=None):
        """The library's, or the one of `--optim muon`, also under DeepSpeed, to which no trainer
        may be given one."""
        if self.optimizer is None and getattr(self.args, "use_muon", False):
            self.optimizer = build_optimizer(self.model if model is None else model, self.args)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The library's; beside the metrics of an evaluation those of `--eval_pairs`."""
        if "eval_loss" in logs and getattr(self.args, "eval_pairs", None):
            logs |= pair_metrics(self)
        super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The library's schedule, warmed up as above; raises UserError where the rate of every step
        would be 0."""
        is_new = self.lr_scheduler is None
        if self.time_budget:
            num_training_steps = steps_on_time(self.args)
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            self.args.lr_scheduler_kwargs = schedule_options(self.args, num_training_steps)
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if is_new and isinstance(schedule, LambdaLR):
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            warm = partial(warmed_up, warmup_steps=warmup_steps)
            factors = [partial(warm, factor=factor) for factor in schedule.lr_lambdas]
            if not any(factors[0](step) for step in range(num_training_steps)):
                raise UserError(
                    f"--lr_scheduler_type {self.args.lr_scheduler_type.value} has the learning rate"
                    f" 0 at each of the {num_training_steps:,} steps, which would train nothing."
                    f" Change --lr_scheduler_kwargs ({self.args.lr_scheduler_kwargs}), or train for"
                    " more steps."
                )
            if self.time_budget:
                factors = [partial(self.time_budget.factor, schedule=each) for each in factors]
            self.lr_scheduler = LambdaLR(schedule.optimizer, factors)
        return self.lr_scheduler

    def set_initial_training_values(self, args, dataloader):
        """The library's; under a time budget with more steps than any run has."""
        if self.time_budget:
            args = copy.copy(args)
            args.max_steps = MOST
        return super().set_initial_training_values(args, dataloader)

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self.time_budget:  # the rows of that many steps
            num_train_samples *= self.state.max_steps / MOST
        return super()._finalize_training(trial, num_train_samples, start_time)


class BlockTrainer(ScheduledTrainer):
    """For rows of `load_blocks`. Identical to the library's except: held-out loss is the mean over
    targets, also where rows have different numbers of them. The library takes the mean of each
    batch, and then of the batches. Added are the bits per byte of all held-out rows, and of each
    source where there are several.

    `eval_counts`: "targets", "target_bytes" and "blocks" of the held-out rows, perhaps of each of
    the "sources", which lie one after the other; see `documents.load_blocks`.
    """

    def __init__(self, *args, eval_counts: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_counts = eval_counts

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate source by source, so that none has to be read twice."""
        loop = partial(super().evaluation_loop, metric_key_prefix=metric_key_prefix, **kwargs)
        counts = self.eval_counts
        if not counts or metric_key_prefix != "eval":
            return loop(dataloader, description, *args)
        sources = [source for source in counts.get("sources", ()) if source["blocks"]]

        outputs, first = [], 0
        for source in sources:
            rows = self.eval_dataset.select(range(first, first + source["blocks"]))
            first += source["blocks"]
            size, sampler = self.args.eval_batch_size, self._get_eval_sampler
            batches = self._get_dataloader(
                rows, description, size, sampler, dataloader_key=source["name"]
            )
            self.eval_counts = source
            outputs.append(loop(batches, description, *args))
        self.eval_counts = counts

        output = outputs[0] if outputs else loop(dataloader, description, *args)
        losses = [each.metrics["eval_loss"] for each in outputs]
        if outputs:
            output.metrics["eval_loss"] = sum(
                loss * source["targets"] / counts["targets"]
                for loss, source in zip(losses, sources, strict=True)
            )
            output = output._replace(num_samples=sum(each.num_samples for each in outputs))
        output.metrics["eval_bits_per_byte"] = bits_per_byte(output.metrics["eval_loss"], counts)
        for loss, source in zip(losses, sources, strict=True):
            output.metrics[f"eval_bits_per_byte/{source['name']}"] = bits_per_byte(loss, source)
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training and self.eval_counts:
            # The library multiplies by the processes and weights the batch by its rows: divide by
            # these rows' share
            rows = len(inputs["input_ids"])
            if self.args.average_tokens_across_devices:
                rows *= self.accelerator.num_processes
            num_items_in_batch = rows * self.eval_counts["targets"] / self.eval_counts["blocks"]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class ModelLossTrainer(SFTTrainer):
    """Identical to TRL's except: the loss is the model's own, and of the positions that predict
    nothing trained it needs no logits.

    TRL projects through the head in tiles and in Python, which saves memory at vocabularies of
    100,000 and more; at 6,400 on a CPU it costs most of a step (benchmarks/throughput.py). The
    price: entropy and token accuracy are not logged.
    """

    weighted = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # With a cache, position_ids that restart would not keep conversations apart
        inputs["use_cache"] = False
        if return_outputs:  # with the logits of all positions
            inputs.pop("max_targets", None)
        # In evaluation each batch has its own mean
        if self.weighted and num_items_in_batch is None:
            num_items_in_batch = inputs["loss_weights"].sum()
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class ChatSFTTrainer(ScheduledTrainer, ModelLossTrainer):
    """For rows of `load_conversations`. Identical to TRL's except for the model's own loss and:

    Rows that have loss_weights keep them, and the loss is sum(w * loss) / sum(w) over all tokens of
    a step: those of its micro-batches and of all processes.

    Packing is best-fit over all of the data, not over each 1,000 rows, and a batch of rows stays in
    rows. Rows behind virtual tokens are padded instead, see `adapters.fit_virtual_tokens`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weighted = "loss_weights" in self.train_dataset.column_names
        model = self.accelerator.unwrap_model(self.model)
        if self.weighted:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            base.loss_function = weighted_causal_lm_loss
        pad_id, multiple = self.processing_class.pad_token_id, self.args.pad_to_multiple_of
        self.data_collator = PackedCollator(pad_id, multiple)
        if virtual_tokens(model):
            embedded = virtual_tokens(model, embedded=True)
            self.data_collator = PaddedCollator(pad_id, multiple, embedded)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class, args, packing: bool, *rest
    ) -> Dataset:
        if packing and "seq_lengths" not in dataset.column_names:
            options = {"batch_size": None, "desc": "packing"}
            dataset = pack_dataset(dataset, args.max_length, "bfd", options)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "loss_weights"})

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Scale the weights of a step so that dividing by its trained tokens is dividing by their
        sum."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.weighted and batches:
            total = sum(batch["loss_weights"].sum() for batch in batches).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total).sum()
            for batch in batches:
                weights = batch["loss_weights"]
                batch["loss_weights"] = weights * (num_items / total).to(weights.device)
        return batches, num_items
