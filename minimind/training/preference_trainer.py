"""The trainer of preference pairs: TRL's losses and metrics, and two losses more, on rows in which
prompts are shared, with reference log-probabilities that are computed once."""

from collections.abc import Callable
from functools import wraps
from types import MethodType

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.nn.functional import embedding, pad
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from minimind.data.packing import IGNORED, SHAPE_STEP
from minimind.data.preference_batches import PreferenceCollator, repetitions, visible_tokens
from minimind.model.kernels_minimind import PIECE, CrossEntropy
from minimind.training.preference_losses import OWN_LOSSES, needs_reference
from minimind.training.preference_metrics import PreferenceMetrics
from minimind.training.references import CachedReferences
from minimind.training.trainers import ScheduledTrainer


class PreferenceTrainer(PreferenceMetrics, ScheduledTrainer, CachedReferences, DPOTrainer):
    """For rows of `load_preferences`. Identical to TRL's except:

    It takes token ids, where TRL would tokenise texts and take control tokens in somebody's words
    for real ones.

    The pairs of a batch are packed into rows, and each has its prompt once (see
    preference_batches.py): TRL computes losses and metrics from the same log-probabilities.

    Without `precompute_ref_log_probs` the reference computes in every step, with `ref_model_on_cpu`
    on the CPU. Losses that need no reference have none.

    The losses of preference_losses.py are added. Where there is no reference, rewards are beta
    times the mean log-probability of a reply's tokens.

    It logs more, see `PreferenceMetrics`.
    """

    # TRL gathers the rewards of a micro-batch, of which every process needs as many
    shares_last_rows = False

    reference_inputs = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
    reference_options = ("ld_alpha", "bf16", "fp16")
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, *, model: PreTrainedModel, ref_model=None, args, processing_class, **kwargs):
        self.packs_pairs = False
        self.has_reference = needs_reference(args.loss_type)
        on_cpu = getattr(args, "ref_model_on_cpu", False)
        self.cpu_reference = ref_model if on_cpu else None
        collator = PreferenceCollator(
            processing_class.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
            packed=True,
            # Flash attention knows no such mask
            share_prompts=model.config._attn_implementation == "sdpa",
        )

        # Without this TRL would place the reference on the device, or load another one
        precomputed = args.precompute_ref_log_probs
        args.precompute_ref_log_probs |= on_cpu
        super().__init__(
            model=model,
            ref_model=None if on_cpu else ref_model,
            args=args,
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        args.precompute_ref_log_probs = precomputed

        self._pack_pairs()
        for reference in (self.ref_model, self.cpu_reference):
            if reference is not None:
                add_packed_forward(self.accelerator.unwrap_model(reference))
        # The batches have the reference's log-probabilities, or `_compute_loss` adds them
        self.precompute_ref_logps = True

        # TRL computes its own losses, `_compute_loss` the others
        losses = list(zip(self.loss_types, self.loss_weights, strict=True))
        self.own_losses = [each for each in losses if each[0] in OWN_LOSSES]
        library = [each for each in losses if each[0] not in OWN_LOSSES]
        self.loss_types, self.loss_weights = ([each[i] for each in library] for i in (0, 1))

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "chosen_mask", "rejected_mask"})

    def _pack_pairs(self) -> None:
        """Let the policy compute on packed rows, from the moment it is first called on."""
        if not self.packs_pairs:
            model = self.model.get_base_model() if is_peft_model(self.model) else self.model
            add_packed_forward(model, self.use_weighting)
            self.packs_pairs = True

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.cpu_reference is not None or not self.has_reference:
            return dataset
        self._pack_pairs()  # TRL's constructor calls this
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _reference_of_batch(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference log-probabilities of a batch that has none; zeros without a reference."""
        if not self.has_reference:
            zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
            return zeros, zeros
        model = self.ref_model or self.model
        if self.cpu_reference is not None:
            model = on_cpu(self.cpu_reference)
        return self.compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        names = self.reference_columns
        if names[0] not in inputs:
            inputs = inputs | dict(zip(names, self._reference_of_batch(inputs), strict=True))
        outputs = []

        def recorded(**arguments):
            outputs.append(model(**arguments))
            return outputs[-1]

        # TRL's losses and metrics
        loss = super()._compute_loss(recorded, inputs, return_outputs)
        if self.has_reference and not self.own_losses:
            return loss
        loss, *rest = loss if return_outputs else (loss,)

        # The others
        mask = inputs["completion_mask"][:, 1:]
        log_probs = outputs[0].log_probs[:, -mask.size(1) :]
        means = (log_probs.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).chunk(2)
        for name, weight in self.own_losses:
            loss = loss + weight * OWN_LOSSES[name](*means, self.args).mean()
        if not self.has_reference:
            self._replace_rewards(*(self.beta * mean.detach() for mean in means))
        return (loss, *rest) if return_outputs else loss

    def _replace_rewards(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Log other rewards of this batch, (pairs,) each, than TRL has."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        rewards = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        rewards["accuracies"] = (chosen > rejected).float()
        for name, values in rewards.items():
            metrics[f"rewards/{name}"][-1] = self.accelerator.gather(values).mean().item()


def on_cpu(model: PreTrainedModel) -> Callable:
    """`model`, which is on the CPU, to call with tensors of any device for what TRL reads of a
    reference."""

    def call(**inputs):
        device = inputs["input_ids"].device
        there = {k: v.cpu() if torch.is_tensor(v) else v for k, v in inputs.items()}
        return FusedCausalLMOutput(log_probs=model(**there).log_probs.to(device))

    return call


# The forward pass


def add_packed_forward(model: PreTrainedModel, with_squares: bool = False) -> None:
    """Let TRL's call of a model (`fused_lm_head=True`) compute on the packed rows of a batch.

    It returns what TRL's head does, at the same places: log-probabilities (rows, S - 1) of the
    labels, entropy, mean logit, whether the label is the most likely token; `with_squares` also
    log(sum p^2). The head is applied only to the tokens that predict one of a reply, where TRL's
    projects all tokens on devices without Triton. The load-balancing loss of experts counts a
    shared token as often as TRL does: once for each sequence.
    """
    library_forward = model.forward

    @wraps(type(model).forward)
    def forward(
        self,
        *args,
        fused_lm_head: bool = False,
        packed_ids: torch.Tensor | None = None,
        packed_positions: torch.Tensor | None = None,
        packed_parts: torch.Tensor | None = None,
        packed_states: torch.Tensor | None = None,
        packed_targets: torch.Tensor | None = None,
        **kwargs,
    ):
        if not fused_lm_head or packed_ids is None:
            return library_forward(*args, fused_lm_head=fused_lm_head, **kwargs)

        # The packed rows
        with_router = bool(kwargs.get("output_router_logits"))
        shared = self.config._attn_implementation == "sdpa"
        outputs = self.base_model(
            input_ids=packed_ids,
            position_ids=packed_positions,
            attention_mask=visible_tokens(packed_parts) if shared else None,
            use_cache=False,
            output_router_logits=with_router,
        )

        # The head. embedding(i, x) is x[i], with a backward that is parallel on a CPU
        count = len(packed_states)
        padded = pad(packed_states, (0, -count % SHAPE_STEP))
        states = embedding(padded, outputs.last_hidden_state.flatten(0, 1))
        logits = self.get_output_embeddings()(states)[:count]
        shape = kwargs["labels"].shape[0], kwargs["labels"].shape[1] - 1
        labels = kwargs["labels"][:, 1:].flatten()[packed_targets]
        log_probs = -CrossEntropy.apply(logits, labels, IGNORED)
        measured = token_statistics(logits.detach(), labels, log_probs.detach(), with_squares)

        # Each where TRL expects it
        def placed(values: torch.Tensor) -> torch.Tensor:
            empty = values.new_zeros(shape[0] * shape[1])
            return empty.index_copy(0, packed_targets, values).view(shape)

        auxiliary_loss = None
        if with_router:
            auxiliary_loss = load_balancing_loss_func(
                outputs.router_logits,
                self.config.num_experts,
                self.config.num_experts_per_tok,
                repetitions(packed_parts),
            )
        return FusedCausalLMOutput(
            log_probs=placed(log_probs),
            aux_loss=auxiliary_loss,
            **{name: placed(values) for name, values in measured.items()},
        )

    model.forward = MethodType(forward, model)


@torch.no_grad()
def token_statistics(
    logits: torch.Tensor, labels: torch.Tensor, log_probs: torch.Tensor, with_squares: bool
) -> dict[str, torch.Tensor]:
    """What TRL logs of each prediction (logits (N, V), labels and their log-probabilities (N,)),
    one cache-sized piece at a time."""
    rows = max(1, PIECE[logits.device.type == "cpu"] // logits.shape[1])
    log_sums = logits.gather(1, labels[:, None]).squeeze(1).float() - log_probs
    found = {"entropy": [], "mean_logits": [], "is_top1": []}
    if with_squares:
        found["log_sum_sq_probs"] = []
    for piece, label, log_sum in zip(
        *(t.split(rows) for t in (logits, labels, log_sums)), strict=True
    ):
        values = piece.float()
        mean = values.mean(dim=-1)
        found["mean_logits"].append(mean)
        found["is_top1"].append(values.argmax(dim=-1) == label)
        values = values - log_sum[:, None]
        probabilities = values.exp()
        found["entropy"].append(-(probabilities * values).sum(dim=-1))
        if with_squares:
            found["log_sum_sq_probs"].append(probabilities.square_().sum(dim=-1).log())
    return {name: torch.cat(values) for name, values in found.items()}
