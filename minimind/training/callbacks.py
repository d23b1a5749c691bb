"""Small callbacks of every run: weights that did not change, early stopping, the routers' load."""

import math
from functools import partial

import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.evaluation import TIMES
from minimind.model.modeling_minimind import MiniMindTopKRouter
from minimind.training.callback_handler import Decoration


def fingerprint(model: nn.Module) -> int:
    """The sum of the bits of all trained weights; of weights that ZeRO-3 divides, this process's
    part."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    trained = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    return sum(t.view(integers[t.element_size()]).sum(dtype=torch.int64).item() for t in trained)


class ChangeCallback(TrainerCallback):
    """Raises UserError at the end of a run, resumed or not, that left every weight as it was."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.before: int | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not args.resume_from_checkpoint:  # else it is restored from the checkpoint
            self.before = fingerprint(model)

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from `state_dict`."""
        self.before = state["before"]

    def on_train_end(self, args, state, control, model=None, **kwargs):
        changed = torch.tensor([self.before != fingerprint(model)], device=args.device)
        if not self.trainer.accelerator.gather(changed).any():
            raise UserError(
                f"this run trained nothing: after {state.global_step:,} steps no weight has"
                f" changed. Each step was skipped, or the learning rate {args.learning_rate:g} is"
                " lost in the weights' rounding. Raise --learning_rate, or train for more steps."
            )


class EarlyStopping(EarlyStoppingCallback):
    """The library's, except: a run has to beat the evaluation before the first step, and a resumed
    run continues to count."""

    training = True

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved:
            name = "early_stopping_patience_counter"
            self.early_stopping_patience_counter = saved["attributes"][name]

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self.training:
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        count, name = self.early_stopping_patience_counter, args.metric_for_best_model
        if count >= self.early_stopping_patience and state.is_world_process_zero:
            say(
                f"stopping early: {count} evaluations did not improve {name}"
                f" {state.best_metric:.4f}"
            )


class Baseline(TrainerCallback):
    """Makes the evaluation before the first step the best so far, which the run has to beat, unless
    it is not finite: nothing compares with that.

    Raises:
        UserError: an evaluation has no `--metric_for_best_model`.
    """

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        name = args.metric_for_best_model
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}") if name else None
        if name and value is None:
            names = [key for key in metrics if key.startswith("eval_") and not key.endswith(TIMES)]
            raise UserError(
                f"--metric_for_best_model {name}: the evaluation has no such metric, only"
                f" {', '.join(names)}."
            )
        if not state.global_step and value is not None and math.isfinite(value):
            state.best_metric = value


class RouterLoadCallback(Decoration):
    """Adds to each log how a mixture of experts spreads its tokens: `router_load/layer_0/expert_1`
    is the share of the visits since the last log, `router_load/max` the busiest expert's of all
    layers. Counted on the device, for the main process's tokens."""

    def __init__(self, model: nn.Module):
        self.routers = [each for each in model.modules() if isinstance(each, MiniMindTopKRouter)]

    def on_train_begin(self, args, state, control, **kwargs):
        weights = [router.weight for router in self.routers]
        self.visits = [weight.new_zeros(len(weight), dtype=torch.float) for weight in weights]
        self.hooks = [
            router.register_forward_hook(partial(self._count, visits))
            for router, visits in zip(self.routers, self.visits, strict=True)
        ]

    @staticmethod
    @torch.no_grad()
    def _count(visits: torch.Tensor, router: MiniMindTopKRouter, inputs, outputs: tuple) -> None:
        if router.training:
            top_k_index = outputs[-1].flatten()
            visits.scatter_add_(0, top_k_index, torch.ones_like(top_k_index, dtype=visits.dtype))

    def state_dict(self) -> dict:
        """The visits since the last log, for a resumed run."""
        return {"visits": [visits.cpu() for visits in self.visits]}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from `state_dict`; called after `on_train_begin`."""
        for visits, saved in zip(self.visits, state["visits"], strict=True):
            visits.copy_(saved)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        shares = [(visits / visits.sum()).tolist() for visits in self.visits]
        for layer, experts in enumerate(shares):
            for expert, share in enumerate(experts):
                logs[f"router_load/layer_{layer}/expert_{expert}"] = round(share, 4)
        logs["router_load/max"] = max(map(max, shares))
        for visits in self.visits:
            visits.zero_()

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()
