"""The trainer that continues an interrupted run exactly: it records and restores what the libraries
keep in memory alone."""

import time
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from minimind.common.errors import UserError, reason
from minimind.common.language import say
from minimind.stage_directory import check_fit, virtual_tokens
from minimind.training.checkpoints import best_of, restore_logs
from minimind.training.definition import LENGTH, is_about
from minimind.training.guards import GuardedTrainer
from minimind.training.saving import reports_disk_errors
from minimind.training.time_budget import TimeBudget


class ResumableTrainer(GuardedTrainer):
    """Mixed into the libraries' trainers; identical to them except: a resumed run restores what the
    library forgets (the loss since the last log, the trackers' means, the callbacks' counts, time
    spent), and does not train any further where the last step was done.
    """

    changes: dict[str, tuple]  # accepted ones to the definition of the run: key -> (old, new)
    started: float | None = None  # time.time() at the beginning, as if it had not been interrupted
    time_budget: "TimeBudget | None" = None
    earlier_seconds = 0.0  # of training before the interruption

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.changes = {}

    def train(self, resume_from_checkpoint=None, **options):
        """The library's; raises UserError where a file of the checkpoint asks for code to be
        run."""
        try:
            return super().train(resume_from_checkpoint, **options)
        except UnpicklingError as error:
            raise UserError(
                f"{resume_from_checkpoint} cannot be loaded: {reason(error)}. Start over in another"
                " --output_dir; docs/security.md says what a checkpoint may hold."
            ) from error

    def run_state(self) -> dict:
        """What this process adds to a checkpoint."""
        callbacks = self.callback_handler.callbacks
        state = {
            "loss": self._tr_loss.detach().cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "seconds": self.earlier_seconds + time.time() - self.train_began,
            "wall_seconds": time.time() - self.started if self.started else 0.0,
            "callbacks": {
                type(callback).__name__: callback.state_dict()
                for callback in callbacks
                if hasattr(callback, "state_dict")
            },
            "exported": {
                type(callback).__name__: callback.state()["attributes"]
                for callback in callbacks
                if isinstance(callback, ExportableState)
            },
            "training": self.model.training,  # by which TRL's log chooses between its metrics
        }
        if hasattr(self, "_total_train_tokens"):  # TRL's
            state["trl_tokens"] = self._total_train_tokens
            state["trl_metrics"] = {mode: dict(values) for mode, values in self._metrics.items()}
        if getattr(self.args, "sync_ref_model", False):  # DPO's reference that follows the model
            state["reference"] = self.accelerator.unwrap_model(self.ref_model).state_dict()
        return state

    def restore_run_state(self, checkpoint: Path) -> None:
        """Restore what `run_state` returned; called when training begins, after the library has
        reset its own."""
        files = sorted(checkpoint.glob("run_state_*.pth"))
        states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        alike = len(states) == self.args.world_size
        state = states[self.args.process_index if alike else 0]

        # The log shows the mean over the processes: of another number of them each takes that mean.
        loss = state["loss"] if alike else torch.stack([each["loss"] for each in states]).mean(0)
        self._tr_loss.copy_(loss)
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = state["last_logged"]
        self._initial_global_step = 0  # the mean loss at the end is over all steps
        self.earlier_seconds = state["seconds"]
        if self.started:
            self.started -= state["wall_seconds"]
        self.state.best_model_checkpoint = best_of(checkpoint)
        self.model.train(state.get("training", True))
        # How often to log, evaluate and save may have changed
        self.state.compute_steps(self.args, self.state.max_steps)

        for callback in self.callback_handler.callbacks:
            name = type(callback).__name__
            if name in state["callbacks"] and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(state["callbacks"][name])
            for attribute, value in state["exported"].get(name, {}).items():
                setattr(callback, attribute, value)
            if isinstance(callback, EarlyStoppingCallback):
                count = callback.early_stopping_patience_counter
                self.control.should_training_stop |= count >= callback.early_stopping_patience

        if "trl_metrics" in state and hasattr(self, "_metrics"):
            self._total_train_tokens = state["trl_tokens"]
            for mode, values in state["trl_metrics"].items():
                self._metrics[mode].update(values)
        if "reference" in state:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])
        if self.args.should_save:
            with reports_disk_errors(Path(self.args.output_dir)):
                restore_logs(checkpoint, Path(self.args.output_dir))

    def _issue_warnings_after_load(self, load_result):
        # Tied weights are written once, see `saving.save_model`
        tied = getattr(self.model, "all_tied_weights_keys", ())
        missing = [key for key in load_result.missing_keys if key not in tied]
        path = Path(self.args.resume_from_checkpoint or self.args.output_dir)
        # Peft reports this one although it has read it
        unexpected = {*load_result.unexpected_keys}
        if virtual_tokens(self.accelerator.unwrap_model(self.model)):
            unexpected.discard("prompt_embeddings")
        check_fit(path, missing, unexpected)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The library's; then an accepted change of rate, decay or betas replaces the
        checkpoint's."""
        changes = self.changes if checkpoint else {}
        old, new = changes.get("lr_scheduler_type", (None, None))
        # These keep another kind of state
        if not {old, new}.isdisjoint(("reduce_lr_on_plateau", "greedy")):
            raise UserError(
                f"--lr_scheduler_type {new}: a run that had {old} cannot be resumed with it. Put"
                " the old one back, or start over in another --output_dir."
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if not changes:
            return
        old, new = changes.get("learning_rate", (1, 1))
        schedule, groups = self.lr_scheduler, self.optimizer.param_groups

        def scaled(rate: float) -> float:
            return rate * new / old if old else new

        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = list(map(scaled, schedule.base_lrs))
        for index, group in enumerate(groups):
            group["lr"] = scaled(group["lr"])
            if "initial_lr" in group:
                group["initial_lr"] = scaled(group["initial_lr"])
            if hasattr(schedule, "lr_lambdas"):  # the next step's, by the new schedule
                factor = schedule.lr_lambdas[index](schedule.last_epoch)
                group["lr"] = schedule.base_lrs[index] * factor
            if "weight_decay" in changes and group.get("weight_decay"):
                group["weight_decay"] = self.args.weight_decay
            if "betas" in group:
                group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
        schedule._last_lr = [group["lr"] for group in groups]  # what the next log shows

    def _run_epoch(self, *args, start_time, **kwargs):
        self.train_began = start_time
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, start_time=start_time, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        start_time -= self.earlier_seconds
        return super()._finalize_training(trial, num_train_samples, start_time)


class ResumeCallback(TrainerCallback):
    """Restores an interrupted run when training begins."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.resume_from_checkpoint:
            self.trainer.restore_run_state(Path(args.resume_from_checkpoint))
            self._say_rate(state, kwargs["optimizer"])

    def _say_rate(self, state, optimizer) -> None:
        """Report where another length of the run moves the learning rate, as of a cosine that was
        already low."""
        rates = [line["learning_rate"] for line in state.log_history if "learning_rate" in line]
        is_resized = any(is_about(key, LENGTH) for key in self.trainer.changes)
        if rates and state.is_world_process_zero and is_resized:
            rate = optimizer.param_groups[0]["lr"]
            say(
                f"the learning rate was {rates[-1]:.3g} in the last step, and is {rate:.3g} in the"
                " next"
            )
