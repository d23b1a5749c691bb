"""A run that was interrupted goes on as if it had not been: the same command again continues from the last whole
checkpoint, to the same bits.

    run.json               in the output directory: which run this is, and its recipe; written first
    checkpoint-N/          the library's files, and
        recipe.json        all that decides the result, to notice that a run is not the same any more
        run_state_R.pth    of process R: what the library keeps in memory alone
        train_log.jsonl    the log up to here, so that no line of it is lost or stands there twice
        manifest.json      sizes and hashes of all these; written last, so that what has none is not whole

All of it is on the disk, not only in the system's memory, before the manifest is: a power loss leaves a whole
checkpoint or one that is known not to be.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler, safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minimind.common.errors import UserError, decoration, reason
from minimind.common.files import (
    hash_file,
    read_json,
    require_fields,
    sync_directory,
    sync_files,
    write_bytes,
    write_json,
)
from minimind.common.language import say
from minimind.common.recipes import read_deepspeed
from minimind.stage_directory import check_fit, library_versions, weights_hash
from minimind.tokenizer import tokenizer_hash
from minimind.training.launch import is_main_process
from minimind.training.output_directory import (
    INCOMPLETE,
    MANIFEST,
    RECIPE,
    RUN_LOGS,
    checkpoints,
    delete_checkpoint,
)
from minimind.training.saving import Writing, checkpoint_bytes, reports_disk_errors

RUN_STATE = {"loss", "total_loss", "last_logged", "seconds", "wall_seconds", "callbacks", "exported"}  # of run_state_*

# Arguments that may change: where a run is written and what it says, and how data reaches it, not what it computes.
# fmt: off
HARMLESS = frozenset((
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_changed_recipe", "run_name", "report_to",
    "project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "push_to_hub", "hub_model_id",
    "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "disable_tqdm", "log_level",
    "log_level_replica", "log_on_each_node", "logging_strategy", "logging_first_step", "logging_steps",
    "logging_nan_inf_filter", "include_num_input_tokens_seen", "save_strategy", "save_steps", "save_total_limit",
    "save_on_each_node", "save_only_model", "enable_jit_checkpoint", "local_rank", "on_findings", "do_train",
    "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps",
    "eval_do_concat_batches", "eval_use_gather_object", "per_device_eval_batch_size", "prediction_loss_only",
    "batch_eval_metrics", "include_for_metrics", "skip_memory_metrics", "dataloader_num_workers",
    "dataloader_prefetch_factor", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_multiprocessing_context", "dataset_num_proc", "ddp_timeout",
    "restore_callback_states_from_checkpoint", "torch_empty_cache_steps", "debug", "sample_steps", "sample_prompts",
    "sample_tokens",
    "model_config", "tokenizer", "model_name_or_path", "trust_remote_code", "model_revision",
))
# fmt: on
# But evaluations decide, where they stop the run or choose its weights.
EVALUATIONS = frozenset(("eval_strategy", "eval_steps", "eval_delay"))
# Without these the files of a checkpoint fit neither model nor optimizer.
DECISIVE = ("stage", "model", "tokenizer", "optim", "deepspeed", "use_peft", "lora_r", "lora_target_modules")
DECISIVE += ("lora_target_parameters", "modules_to_save", "use_dora")
INFORMATION = ("libraries", "device", "threads")  # may change the last bits; said, not refused
LENGTH = ("max_steps", "num_train_epochs")
WORLD = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
# It looks for the best checkpoint where the run was before it was moved; `take_up` knows better.
logging.getLogger("transformers.trainer").addFilter(lambda said: not said.msg.startswith("The best checkpoint"))


# Checkpoints: whole or not


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """Declare a checkpoint whole: list its files with sizes and hashes, in a file that appears at once, after all that
    it lists is on the disk."""
    sync_files(checkpoint)
    files = {
        str(file.relative_to(checkpoint)): {"size": file.stat().st_size, "xxh3_128": hash_file(file)}
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {**facts, "files": files})
    sync_directory(checkpoint.parent)


def read_manifest(checkpoint: Path) -> dict:
    """{"step", "processes", "files"} of a whole checkpoint; raises UserError."""
    fields = {"step": int, "processes": int, "files": dict}
    manifest = read_json(checkpoint / MANIFEST, "It lists the files of a checkpoint.", fields=fields)
    for name, expected in manifest["files"].items():
        expected = expected if isinstance(expected, dict) else {}
        require_fields(f"{checkpoint / MANIFEST}: {name}", expected, {"size": int, "xxh3_128": str}, "")
    return manifest


def problem_of(checkpoint: Path, hashes: bool = True, weights_alone: bool = False) -> str | None:
    """Why a run cannot go on from this checkpoint, or None if it is whole; `hashes`: read all of it. With
    `weights_alone` one that holds nothing else is whole too."""
    if (checkpoint / INCOMPLETE).exists():
        return f"marked incomplete by the library ({INCOMPLETE})"
    if not os.path.lexists(checkpoint / MANIFEST):
        return f"it was never finished: there is no {MANIFEST}, which is written last"
    try:
        manifest = read_manifest(checkpoint)
        files = manifest["files"]
        for name, expected in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is gone"
            if (size := file.stat().st_size) != expected["size"]:
                return f"{name} has {size:,} bytes, was written with {expected['size']:,}"
        if not (weights_alone or any(name.startswith("rng_state") for name in files)):
            return "it holds weights alone (--save_only_model)"
        if not hashes:
            return None
        if missing := sorted({TRAINER_STATE_NAME, RECIPE, "run_state_0.pth"} - set(files)):
            return f"{MANIFEST} does not name {', '.join(missing)}"
        for name, expected in files.items():
            if hash_file(checkpoint / name) != expected["xxh3_128"]:
                return f"{name} is corrupted: its hash is not the one it was written with"
            if problem := _unreadable(checkpoint / name):
                return f"{name} cannot be read: {problem}"
        if hashes and not manifest.get("finite") and (name := _not_finite(checkpoint)):
            return f"{name} holds weights that are not finite"
    except (UserError, OSError) as error:
        return str(error).strip().removeprefix(f"{checkpoint}/")
    return None


def _unreadable(file: Path) -> str | None:
    """Why the libraries could not load a file though its hash fits: it was written wrongly. Tensors stay unread."""
    try:
        if file.name == TRAINER_STATE_NAME:
            read_json(file, "", fields={"global_step": int, "max_steps": int, "log_history": list})
            TrainerState.load_from_json(file)
        elif file.suffix == ".json":
            read_json(file, "")
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in (".pt", ".pth") and not file.parent.name.startswith("global_step"):  # DeepSpeed's own
            with safe_globals():
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            if not isinstance(state, dict) or (file.name.startswith("run_state") and not state.keys() >= RUN_STATE):
                return "it holds something else"
    except Exception as error:  # of json, pickle, zip or safetensors
        return reason(error).splitlines()[0].removeprefix(f"{file}: ")
    return None


def _not_finite(checkpoint: Path) -> str | None:
    """The first file with weights that are not finite; for checkpoints whose manifest does not say that all are."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not largest(tensor).isfinite():
                    return f"{file.name}, {name},"
    return None


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, NaN where there is one, in no memory of its own."""
    return torch.linalg.vector_norm(tensor.detach(), float("inf")) if tensor.numel() else tensor.new_zeros(())


def doubt(checkpoint: Path, steps: int) -> None:
    """Note in a checkpoint, if there is one, that so many steps from it were not finite, and none was."""
    if (checkpoint / MANIFEST).is_file():
        with decoration("a note in a checkpoint"):
            write_json(checkpoint / MANIFEST, {**read_manifest(checkpoint), "bad_steps": steps})


def doubted(checkpoint: Path) -> str | None:
    """Why a run should not go on from a whole checkpoint unless it is told to."""
    steps = read_manifest(checkpoint).get("bad_steps")
    return steps and f"the run stopped after it, the {steps} steps that followed were not finite"


def last_good(output_dir: Path) -> Path | None:
    """The checkpoint that the same command would go on from, by the sizes of its files alone."""
    good = (path for path in checkpoints(output_dir) if not (problem_of(path, hashes=False) or doubted(path)))
    return next(good, None)


def last_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from, and one line for each newer one about what is wrong with it.

    Raises:
        UserError: only such are left as no step from them was finite.
    """
    problems, suspect = [], None
    for checkpoint in checkpoints(output_dir):
        problem = problem_of(checkpoint)
        if problem is None:
            problem = doubted(checkpoint)
            if problem is None:
                return checkpoint, problems
            suspect = suspect or f"{checkpoint}: {problem}"
        problems.append(f"skipped {checkpoint}: {problem}")
    if suspect:
        raise UserError(
            f"{suspect}. There is no checkpoint before it. To go on from it anyway, with another --learning_rate say, "
            "give it to --resume_from_checkpoint; to begin anew, give --overwrite_output_dir true and "
            "--resume_from_checkpoint false."
        )
    return None, problems


def rotate(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Keep the newest `limit` whole checkpoints and those of `keep`; delete the others and all that are broken.

    The library counts broken ones too, and may so delete the last one that is whole.
    """
    if not limit or limit < 1:
        return
    kept = {path.resolve() for path in keep}
    for checkpoint in checkpoints(output_dir):
        if checkpoint.resolve() in kept:
            continue
        if len(kept) < limit and problem_of(checkpoint, hashes=False, weights_alone=True) is None:
            kept.add(checkpoint.resolve())
        else:
            delete_checkpoint(checkpoint)


# Recipes: the same run or another


def recipe_of(name: str, args, data, model, tokenizer, parent: Path | None, options: Iterable) -> dict:
    """All that decides the result of a stage, as JSON: arguments, data, model, tokenizer, weights it starts from,
    processes; for information the libraries' versions, the device and its threads."""
    recipe: dict[str, Any] = {}
    chooses = args.load_best_model_at_end or getattr(args, "early_stopping_patience", None) is not None
    harmless = HARMLESS - EVALUATIONS if chooses else HARMLESS
    for source in (args, *options):
        fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
        recipe |= {key: value for key, value in fields.items() if key not in harmless}
    if getattr(args, "use_muon", False):
        recipe["optim"] = "muon"
    if isinstance(args.deepspeed, str):
        recipe["deepspeed"] = read_deepspeed(args.deepspeed)
    config = model.config.to_dict()
    for key in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        config.pop(key, None)
    recipe |= {
        "stage": name,
        "data": {part: _without_files(facts) for part, facts in data.facts.items() if isinstance(facts, dict)},
        "model": config,
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": xxhash.xxh3_64_hexdigest((tokenizer.chat_template or "").encode()),
        "starts_from": weights_hash(parent) if parent else None,
        "processes": args.world_size,
        "libraries": library_versions(),
        "device": args.device.type,
        "threads": torch.get_num_threads() if args.device.type == "cpu" else None,
    }
    return json.loads(json.dumps(recipe, default=lambda value: getattr(value, "value", None) or str(value)))


def _without_files(facts: Any) -> Any:
    """Counts and hashes of data, without the paths: the same content may lie elsewhere today."""
    if isinstance(facts, dict):
        return {key: _without_files(value) for key, value in facts.items() if key != "files"}
    return [_without_files(value) for value in facts] if isinstance(facts, list) else facts


def differences(saved: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, nested ones as a.b, each with both values; None where it is missing."""
    old, new = dict(flat(saved)), dict(flat(now))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def flat(value: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested JSON object -> ("a.b", value) of its leaves."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def changed(saved: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """The differences that make another run. Another number of processes does not, where it takes the rows per step
    that it is given, or those that it would work out by itself (elastic.py)."""
    changes = differences(saved, now)
    changes = {key: pair for key, pair in changes.items() if not is_about(key, INFORMATION)}
    if "processes" in changes and _shares_rows(saved, now):
        changes = {key: pair for key, pair in changes.items() if not is_about(key, WORLD)}
    return changes


def _shares_rows(saved: dict, now: dict) -> bool:
    one, two = ([recipe.get(key) or 1 for key in WORLD] for recipe in (saved, now))
    return one[1:] == two[1:] or math.prod(one) == math.prod(two)


def is_about(key: str, names: Iterable[str]) -> bool:
    """Whether a key of `differences` is one of the names or inside of it."""
    return key.split(".")[0] in names


def listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """Changed keys as aligned lines: name, old value -> new value."""
    width = max(map(len, changes))
    shown = {key: [json.dumps(value, ensure_ascii=False) for value in pair] for key, pair in changes.items()}
    lines = (f"  {key:<{width}}  {old[:80]} -> {new[:80]}" for key, (old, new) in shown.items())
    return "\n".join(lines)


# The trainers' part


class ResumableTrainer(Trainer):
    """Mixed into the libraries' trainers; identical to them except:

    a checkpoint is declared whole by a manifest, and rotation keeps whole ones; a resumed run takes up what the
    library forgets (the loss since the last log, the trackers' means, the callbacks' counts, time spent), does not
    train on where the last step was done, and groups rows by length as it did before.
    """

    stage = None  # set by `Stage.announce`
    last_saved: int | None = None
    weights_step: int | None = None  # the step whose weights it has in the end: the last one's or the best one's
    interrupted = False  # set by `InterruptCallback`
    earlier_seconds = 0.0  # of training before the interruption

    def train(self, resume_from_checkpoint=None, **options):
        """The library's; raises UserError where a file of the checkpoint asks for code to be run."""
        try:
            return super().train(resume_from_checkpoint, **options)
        except UnpicklingError as error:
            raise UserError(
                f"{resume_from_checkpoint} cannot be loaded: {reason(error)}. Begin anew in another --output_dir; "
                "docs/security.md says what a checkpoint may hold."
            ) from error

    def _save_checkpoint(self, model, trial):
        """Raises NotWrittenError, on all processes, where the disk of one does not take its part."""
        step = self.state.global_step
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.last_saved == step:
            return  # asked for twice, as by --save_steps and a signal
        self.check_weights()
        self.writing = writing = Writing(checkpoint, checkpoint_bytes(self.model, self.is_deepspeed_enabled))
        if self.args.should_save:
            with writing.part():
                delete_checkpoint(checkpoint)  # a broken one, or of a run that was given up
                checkpoint.mkdir(parents=True, exist_ok=True)
                write_json(checkpoint / RECIPE, self.stage.recipe if self.stage else {})  # by it it is ours
        barrier()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            # Of several processes the others may wait inside for one that left with an error of another kind.
            with writing.part(Exception if self.args.world_size == 1 else OSError):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.writing = limit, None
        with writing.part():
            torch.save(self._run_state(), checkpoint / f"run_state_{self.args.process_index}.pth")
        if self.args.should_save:
            with writing.part():
                keep_logs(Path(self.args.output_dir), checkpoint)
        writing.check()
        if self.args.should_save:
            with writing.part():
                write_manifest(checkpoint, step=step, processes=self.args.world_size, finite=True)
        writing.check()
        self.last_saved = step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            with decoration("deleting older checkpoints"):
                rotate(checkpoint.parent, limit, [checkpoint, *([Path(best)] if best else [])])

    writing: Writing | None = None  # while a checkpoint is written

    def _part(self):
        return self.writing.part() if self.writing else nullcontext()

    def _save(self, *args, **kwargs):
        with self._part():
            super()._save(*args, **kwargs)

    def _save_rng_state(self, output_dir):
        with self._part():
            super()._save_rng_state(output_dir)

    def _save_scaler(self, output_dir):
        with self._part():
            super()._save_scaler(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not (self.writing and self.is_deepspeed_enabled):
            with self._part():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        engine = self.model_wrapped
        files, script = self.writing.parts(engine.checkpoint_engine, "save", "makedirs"), "_copy_recovery_script"
        with files, self.writing.parts(engine, script):
            try:
                super()._save_optimizer_and_scheduler(output_dir)
            except OSError as error:  # of the file "latest", before whose barrier the others wait
                self.writing.keep(error)
                barrier()

    def check_weights(self) -> None:
        """Raises UserError, on all processes, where a weight of any is not finite: nobody should go on from it."""
        weights = self.accelerator.unwrap_model(self.model).state_dict(keep_vars=True)
        weights = {name: getattr(value, "ds_tensor", value) for name, value in weights.items()}
        weights = {name: value for name, value in weights.items() if value.is_floating_point()}
        values = torch.stack([largest(value).float().to(self.args.device) for value in weights.values()])
        finite = values.isfinite().tolist()
        names = gather_object([name for name, is_finite in zip(weights, finite, strict=True) if not is_finite])
        if not names:
            return
        rest = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        good = last_good(Path(self.args.output_dir))
        left = f"The same command goes on from {good}." if good else "There is no checkpoint from before."
        raise UserError(
            f"after step {self.state.global_step:,} the weights are not finite: {names[0]}{rest}. They are not saved "
            f"and the run ends, since no step could make them finite again. {left} Lower --learning_rate, and leave "
            "--max_nonfinite_steps above 0, which skips steps that are not finite."
        )

    def _run_state(self) -> dict:
        state = {
            "loss": self._tr_loss.detach().cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "seconds": self.earlier_seconds + time.time() - self.train_began,
            "wall_seconds": time.time() - self.stage.started if self.stage else 0.0,
            "callbacks": {
                type(callback).__name__: callback.state_dict()
                for callback in self.callback_handler.callbacks
                if hasattr(callback, "state_dict")
            },
            "exported": {
                type(callback).__name__: callback.state()["attributes"]
                for callback in self.callback_handler.callbacks
                if isinstance(callback, ExportableState)
            },
        }
        state["training"] = self.model.training  # by which TRL's log chooses between its metrics
        if hasattr(self, "_total_train_tokens"):  # TRL's
            state["trl_tokens"] = self._total_train_tokens
            state["trl_metrics"] = {mode: dict(values) for mode, values in self._metrics.items()}
        if getattr(self.args, "sync_ref_model", False):  # DPO's reference that follows the model
            state["reference"] = self.accelerator.unwrap_model(self.ref_model).state_dict()
        return state

    def take_up(self, checkpoint: Path) -> None:
        """Restore what `_run_state` saved; called when training begins, after the library has reset its own."""
        files = sorted(checkpoint.glob("run_state_*.pth"))
        states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        alike = len(states) == self.args.world_size
        state = states[self.args.process_index if alike else 0]
        # The log shows the mean over the processes: with another number of them each takes that mean.
        loss = state["loss"] if alike else torch.stack([each["loss"] for each in states]).mean(0)
        self._tr_loss.copy_(loss)
        self._total_loss_scalar, self._globalstep_last_logged = state["total_loss"], state["last_logged"]
        self._initial_global_step = 0  # the mean loss at the end is over all steps
        self.earlier_seconds = state["seconds"]
        self.state.best_model_checkpoint = best_of(checkpoint)
        self.model.train(state.get("training", True))
        self.state.compute_steps(self.args, self.state.max_steps)  # how often to log, evaluate and save may change
        for callback in self.callback_handler.callbacks:
            name = type(callback).__name__
            if name in state["callbacks"] and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(state["callbacks"][name])
            for attribute, value in state["exported"].get(name, {}).items():
                setattr(callback, attribute, value)
            if isinstance(callback, EarlyStoppingCallback):
                counted = callback.early_stopping_patience_counter
                self.control.should_training_stop |= counted >= callback.early_stopping_patience
        if "trl_metrics" in state and hasattr(self, "_metrics"):
            self._total_train_tokens = state["trl_tokens"]
            for mode, values in state["trl_metrics"].items():
                self._metrics[mode].update(values)
        if "reference" in state:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])
        if self.stage:
            self.stage.started -= state["wall_seconds"]
        if self.args.should_save:
            with reports_disk_errors(Path(self.args.output_dir)):
                restore_logs(checkpoint, Path(self.args.output_dir))

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return SeededEpochs(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _issue_warnings_after_load(self, load_result):
        tied = getattr(self.model, "all_tied_weights_keys", ())  # written once, see `stages.save_model`
        missing = [key for key in load_result.missing_keys if key not in tied]
        check_fit(Path(self.args.resume_from_checkpoint or self.args.output_dir), missing, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The library's, and then what an accepted change of the recipe asks for in place of the checkpoint's."""
        changes = self.stage.changes if self.stage and checkpoint else {}
        old, new = changes.get("lr_scheduler_type", (None, None))
        if not {old, new}.isdisjoint(("reduce_lr_on_plateau", "greedy")):  # they keep another kind of state
            raise UserError(
                f"--lr_scheduler_type {new}: a run cannot be resumed with it that had {old}. Put the old one back, or "
                "begin anew in another --output_dir."
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if not changes:
            return
        old, new = changes.get("learning_rate", (1, 1))
        schedule = self.lr_scheduler

        def scaled(rate: float) -> float:
            return rate * new / old if old else new

        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = list(map(scaled, schedule.base_lrs))
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = scaled(group["lr"])
            if "initial_lr" in group:
                group["initial_lr"] = scaled(group["initial_lr"])
            if hasattr(schedule, "lr_lambdas"):  # the next step's, by the new schedule
                group["lr"] = schedule.base_lrs[index] * schedule.lr_lambdas[index](schedule.last_epoch)
            if "weight_decay" in changes and group.get("weight_decay"):
                group["weight_decay"] = self.args.weight_decay
            if "betas" in group:
                group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what the next log shows

    def _run_epoch(self, *args, start_time, **kwargs):
        self.train_began = start_time
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, start_time=start_time, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self.interrupted:  # `--save_strategy best` found this step no better, and did not save it
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.weights_step = self.state.global_step
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time - self.earlier_seconds)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self):
        """The library's, where the best checkpoint is whole; sets `weights_step`. The same on all processes."""
        if self.interrupted:
            return
        best = Path(self.state.best_model_checkpoint)
        problem = problem_of(best, weights_alone=True) if is_main_process() else None
        (problem,) = broadcast_object_list([problem])
        if problem is None:
            super()._load_best_model()
            self.weights_step = int(best.name.rpartition("-")[2])
        elif is_main_process():
            say(f"warning: the best model cannot be loaded from {best}: {problem}", file=sys.stderr)

    def create_model_card(self, *args, **kwargs):
        """TRL's form with empty fields only where it goes to the hub: a user's README.md stays."""
        if self.args.push_to_hub:
            with decoration("the model card"):
                super().create_model_card(*args, **kwargs)


class SeededEpochs(Sampler):
    """A sampler whose order depends on seed and epoch alone, not on the random numbers drawn before."""

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self):
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


class ResumeCallback(TrainerCallback):
    """Takes up an interrupted run when training begins; to be added last.

    A checkpoint that falls on the last step, or an epoch's, is written after what the end of the epoch brings (an
    evaluation, say): going on from it begins with the next epoch.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.postponed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if args.resume_from_checkpoint:
            self.trainer.take_up(Path(args.resume_from_checkpoint))
            self._say_rate(state, kwargs["optimizer"])

    def _say_rate(self, state, optimizer) -> None:
        """Where another length of the run moves the learning rate, as a cosine that has come down before."""
        rates = [line["learning_rate"] for line in state.log_history if "learning_rate" in line]
        changes = self.trainer.stage.changes if self.trainer.stage else {}
        rate = optimizer.param_groups[0]["lr"]
        if rates and state.is_world_process_zero and any(is_about(key, LENGTH) for key in changes):
            say(f"the learning rate was {rates[-1]:.3g} in the last step, and is {rate:.3g} in the next")

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and (state.epoch == int(state.epoch) or state.global_step >= state.max_steps):
            control.should_save, self.postponed = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.postponed
        self.postponed = False


def best_of(checkpoint: Path) -> str | None:
    """The best checkpoint at the time of this one; None where there was none, or it is gone.

    It is looked for beside this one, since a run may be moved, and else where it was, since a run may have branched
    off another; only a checkpoint of the same history is it.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME, "Resume from another checkpoint.")
    recorded = state.get("best_model_checkpoint")
    places = [checkpoint.parent / Path(recorded).name, Path(recorded)] if recorded else []
    return next((str(place) for place in places if _is_earlier(place, state)), None)


def _is_earlier(checkpoint: Path, state: dict) -> bool:
    try:
        earlier = read_json(checkpoint / TRAINER_STATE_NAME, "")["log_history"]
    except (UserError, KeyError):
        return False
    return json.dumps(earlier) == json.dumps(state["log_history"][: len(earlier)])


def keep_logs(output_dir: Path, checkpoint: Path) -> None:
    """Copy the logs of a run into a checkpoint."""
    for name in RUN_LOGS:
        with decoration(f"keeping {name}"):
            if (output_dir / name).exists():
                write_bytes(checkpoint / name, (output_dir / name).read_bytes())


def restore_logs(checkpoint: Path, output_dir: Path) -> None:
    """Cut the logs of a stage directory back to what they were at a checkpoint."""
    for name in RUN_LOGS:
        with decoration(f"restoring {name}"):
            if (checkpoint / name).exists():
                write_bytes(output_dir / name, (checkpoint / name).read_bytes())
            else:
                (output_dir / name).unlink(missing_ok=True)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
