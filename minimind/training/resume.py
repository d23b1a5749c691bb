"""A run that was interrupted goes on as if it had not been: the same command again continues from the last whole
checkpoint, to the same bits.

    run.json               in the output directory: which run this is, and its recipe; written first
    checkpoint-N/          the library's files, and
        recipe.json        all that decides the result, to notice that a run is not the same any more
        run_state_R.pth    of process R: what the library keeps in memory alone
        train_log.jsonl    the log up to here, so that no line of it is lost or stands there twice
        manifest.json      sizes and hashes of all these; written last, so that what has none is not whole
"""

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import xxhash
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler, safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minimind.checkpoints import check_fit, library_versions, read_stage, weights_hash
from minimind.errors import UserError
from minimind.language import say
from minimind.recipes import read_deepspeed
from minimind.records import read_json, require_fields, sync_files, write_json
from minimind.tokenizer import tokenizer_hash
from minimind.training.elastic import check_world_size
from minimind.training.guards import check_writable
from minimind.training.launch import is_main_process

MANIFEST, RECIPE, RUN = "manifest.json", "recipe.json", "run.json"
TRAINER_STATE = "trainer_state.json"
INCOMPLETE = "checkpoint-is-incomplete.txt"  # the library's own mark, see transformers.trainer_jit_checkpoint

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
# Without these the files of a checkpoint fit neither model nor optimizer.
DECISIVE = ("stage", "model", "tokenizer", "optim", "deepspeed", "use_peft", "lora_r", "lora_target_modules")
DECISIVE += ("lora_target_parameters", "modules_to_save", "use_dora")
INFORMATION = ("libraries", "device", "threads")  # may change the last bits; said, not refused
WORLD = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
# What may lie in an output directory before a run begins: the shell's and the batch system's logs.
LOGS = (".log", ".out", ".err")


# Checkpoints: whole or not


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """Declare a checkpoint whole: list its files with sizes and hashes, in a file that appears at once."""
    sync_files(checkpoint)
    files = {
        str(file.relative_to(checkpoint)): {"size": file.stat().st_size, "xxh3_128": file_hash(file)}
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {**facts, "files": files})


def file_hash(file: Path) -> str:
    """The xxh3 (128 bits) of a file's bytes, always read anew."""
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()


def read_manifest(checkpoint: Path) -> dict:
    """{"step", "processes", "files"} of a whole checkpoint; raises UserError."""
    fields = {"step": int, "processes": int, "files": dict}
    manifest = read_json(checkpoint / MANIFEST, "It lists the files of a checkpoint.", fields=fields)
    for name, expected in manifest["files"].items():
        expected = expected if isinstance(expected, dict) else {}
        require_fields(f"{checkpoint / MANIFEST}: {name}", expected, {"size": int, "xxh3_128": str}, "")
    return manifest


def problem_of(checkpoint: Path, hashes: bool = True) -> str | None:
    """Why a run cannot go on from this checkpoint, or None if it is whole; `hashes`: read all of it."""
    if (checkpoint / INCOMPLETE).exists():
        return f"marked incomplete by the library ({INCOMPLETE})"
    if not os.path.lexists(checkpoint / MANIFEST):
        return f"it was never finished: there is no {MANIFEST}, which is written last"
    try:
        files = read_manifest(checkpoint)["files"]
        for name, expected in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is gone"
            if (size := file.stat().st_size) != expected["size"]:
                return f"{name} has {size:,} bytes, was written with {expected['size']:,}"
        if not any(name.startswith("rng_state") for name in files):
            return "it holds weights alone (--save_only_model)"
        if not hashes:
            return None
        if missing := sorted({TRAINER_STATE, RECIPE, "run_state_0.pth"} - set(files)):
            return f"{MANIFEST} does not name {', '.join(missing)}"
        for name, expected in files.items():
            if file_hash(checkpoint / name) != expected["xxh3_128"]:
                return f"{name} is corrupted: its hash is not the one it was written with"
            if problem := _unreadable(checkpoint / name):
                return f"{name} cannot be read: {problem}"
    except (UserError, OSError) as error:
        return str(error).strip().removeprefix(f"{checkpoint}/")
    return None


def _unreadable(file: Path) -> str | None:
    """Why the libraries could not load a file though its hash fits: it was written wrongly. Tensors stay unread."""
    try:
        if file.name == TRAINER_STATE:
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
        return (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix(f"{file}: ")
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of an output directory, whole or not, the newest first."""
    found = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in output_dir.glob("*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def last_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from, and one line for each newer one about what is wrong with it."""
    problems = []
    for checkpoint in checkpoints(output_dir):
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(f"skipped {checkpoint}: {problem}")
    return None, problems


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete, the manifest first: cut off half-way, it is not taken for a whole one."""
    with suppress(OSError):  # it may be a directory
        (checkpoint / MANIFEST).unlink()
    shutil.rmtree(checkpoint, ignore_errors=True)


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
        if len(kept) < limit and problem_of(checkpoint, hashes=False) is None:
            kept.add(checkpoint.resolve())
        else:
            delete_checkpoint(checkpoint)


# Recipes: the same run or another


def recipe_of(name: str, args, data, model, tokenizer, parent: Path | None, options: Iterable) -> dict:
    """All that decides the result of a stage, as JSON: arguments, data, model, tokenizer, weights it starts from,
    processes; for information the libraries' versions, the device and its threads."""
    recipe: dict[str, Any] = {}
    for source in (args, *options):
        fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
        recipe |= {key: value for key, value in fields.items() if key not in HARMLESS}
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


def _changed(saved: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """The differences that make another run, whatever the number of processes."""
    changes = differences(saved, now)
    return {key: pair for key, pair in changes.items() if not _is_about(key, (*INFORMATION, *WORLD))}


def _is_about(key: str, names: Iterable[str]) -> bool:
    return key.split(".")[0] in names


def listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """Changed keys as aligned lines: name, old value -> new value."""
    width = max(map(len, changes))
    shown = {key: [json.dumps(value, ensure_ascii=False) for value in pair] for key, pair in changes.items()}
    lines = (f"  {key:<{width}}  {old[:80]} -> {new[:80]}" for key, (old, new) in shown.items())
    return "\n".join(lines)


# What an output directory is, and what to do in it


def check_output_directory(output_dir: Path) -> None:
    """Raises UserError for a directory with something in it that is not a run of ours."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file. Give a directory, new or of the run to continue.")
    if not output_dir.is_dir() or any((output_dir / name).exists() for name in (RUN, "stage.json")):
        return
    names = sorted(path.name for path in output_dir.iterdir())
    strangers = [name for name in names if not name.startswith(".") and not name.endswith(LOGS)]
    if strangers:
        found = ", ".join(strangers[:3])
        if len(strangers) > 3:
            found = f"{found} and {len(strangers) - 3:,} more"
        raise UserError(
            f"--output_dir {output_dir} is not empty and not a run of ours: found {found}, "
            f"but neither {RUN} nor stage.json. Give a directory that does not exist yet."
        )


def clear(output_dir: Path) -> None:
    """Delete what a former run wrote into its directory, `run.json` last."""
    for checkpoint in checkpoints(output_dir):
        delete_checkpoint(checkpoint)
    (output_dir / "stage.json").unlink(missing_ok=True)
    for path in sorted(output_dir.iterdir()):
        if path.is_file() and path.name != RUN and not path.name.endswith(LOGS):
            path.unlink()
    (output_dir / RUN).unlink(missing_ok=True)


def begin(args, recipe: dict, pipeline: str) -> tuple[dict, dict]:
    """Decide between a new run and an old one that goes on, the same in all processes.

    Returns what run.json says of the run ("run": its id, "pipeline", "started"), and the changes of its recipe that
    were accepted, each key with its old and new value.

    Sets `args.resume_from_checkpoint` to the checkpoint to go on from, or None.

    Raises:
        UserError: there is nothing to go on from and there should be, the checkpoint given is broken, the recipe has
            changed, or the directory holds a run that is complete with another recipe.
        SystemExit: with code 0, the run is complete already.
    """
    decision: dict[str, Any] = {}
    if is_main_process():
        try:
            decision = _decide(args, recipe, pipeline)
        except UserError as error:
            decision = {"error": str(error)}
        except OSError as error:
            decision = {"error": f"--output_dir {args.output_dir} cannot be used: {error}"}
    (decision,) = broadcast_object_list([decision])
    if "error" in decision:
        raise UserError(decision["error"])
    if decision.get("complete"):
        raise SystemExit(0)
    args.resume_from_checkpoint = decision["checkpoint"]
    if decision["resized"]:
        check_world_size(decision["saved"], recipe, args)
        # Later checkpoints keep the batch as the recipe had it, so that each restart works out its own accumulation.
        recipe |= {key: decision["saved"][key] for key in WORLD}
    return decision["run"], decision["changes"]


def _decide(args, recipe: dict, pipeline: str) -> dict:
    output_dir, asked = Path(args.output_dir), args.resume_from_checkpoint
    former = read_run(output_dir)
    complete = (output_dir / "stage.json").exists()
    # The same command again, after an interruption, goes on with the run that it began anew.
    another = asked == "false" or (asked == "auto" and (complete or _changed(former.get("recipe", {}), recipe)))
    if args.overwrite_output_dir and output_dir.is_dir() and another:
        clear(output_dir)
        former, complete = {}, False
    if complete and asked in ("auto", "true", "false"):
        return _complete(output_dir, former.get("recipe"), recipe)
    checkpoint, problems = _choose(output_dir, asked)
    for problem in problems:
        say(problem)
    run = {"run": uuid4().hex[:8], "pipeline": pipeline, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    decision = {"checkpoint": checkpoint and str(checkpoint), "resized": False, "changes": {}}
    if checkpoint:
        saved = _read(checkpoint / RECIPE)
        processes = read_manifest(checkpoint)["processes"]
        resized = {saved.get("processes"), processes} != {recipe["processes"]}
        changes = _check_recipe(checkpoint, saved, recipe, args.allow_changed_recipe, resized)
        decision |= {"saved": saved, "resized": resized, "changes": changes}
        run = {key: former.get(key, value) for key, value in run.items()}
        say(f"going on from {checkpoint}")
    elif problems:
        say(f"no whole checkpoint is left in {output_dir}: beginning anew")
    check_writable(output_dir)
    write_json(output_dir / RUN, {**run, "recipe": recipe})
    return {**decision, "run": run}


def read_run(output_dir: Path) -> dict:
    """What run.json says of a run, nothing where there is none. One that does not read costs no checkpoint: what the
    run is stands in the last of them as well."""
    file = output_dir / RUN
    if not os.path.lexists(file):
        return {}
    fields = dict.fromkeys(("run", "pipeline", "started"), str) | {"recipe": dict}
    try:
        return read_json(file, "The run continues from its last whole checkpoint, with a new id.", fields=fields)
    except UserError as error:
        checkpoint, _ = last_whole_checkpoint(output_dir)
        if checkpoint is None:
            return {}
        say(f"notice: {error}")
        return {"recipe": _read(checkpoint / RECIPE)}


def _read(file: Path) -> dict:
    return read_json(file, "Put it back, or delete the directory it is in.")


def _complete(output_dir: Path, saved: dict | None, recipe: dict) -> dict:
    """The stage was finished before: fine if this is the same run again."""
    if changes := _changed(saved, recipe) if saved else None:
        raise UserError(
            f"--output_dir {output_dir} holds a complete run of another recipe:\n{listed(changes)}\nGive another "
            "--output_dir, or delete that run and begin again with --overwrite_output_dir true."
        )
    record = read_stage(output_dir)
    say(
        f"{record.get('stage')} is complete in {output_dir} (step {record.get('steps', 0):,}): nothing to do. To "
        "train it again give another --output_dir, or --overwrite_output_dir true."
    )
    return {"complete": True}


def _choose(output_dir: Path, asked: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that --resume_from_checkpoint means, and what is wrong with newer ones."""
    if asked == "false":
        if found := checkpoints(output_dir):
            raise UserError(
                f"--resume_from_checkpoint false, but {output_dir} holds an unfinished run ({found[0].name}). Leave "
                "the option out to go on, give another --output_dir, or delete the run with --overwrite_output_dir "
                "true."
            )
        return None, []
    if asked in ("auto", "true"):
        checkpoint, problems = last_whole_checkpoint(output_dir)
        if checkpoint is None and asked == "true":
            details = "".join(f"\n  {problem}" for problem in problems)
            raise UserError(f"--resume_from_checkpoint true: there is no whole checkpoint in {output_dir}.{details}")
        return checkpoint, problems
    checkpoint = Path(asked)
    if not checkpoint.is_dir():
        raise UserError(f"--resume_from_checkpoint {asked}: no such directory.")
    if problem := problem_of(checkpoint):
        whole = [path for path in checkpoints(checkpoint.parent) if problem_of(path) is None]
        hint = f" Whole: {', '.join(map(str, whole))}." if whole else ""
        raise UserError(f"--resume_from_checkpoint {asked} is not a whole checkpoint: {problem}.{hint}")
    return checkpoint, []


def _check_recipe(checkpoint: Path, saved: dict, now: dict, accept: bool, resized: bool) -> dict:
    """Say what changed and return it; raises UserError where the run would be another and that was not accepted."""
    changes = differences(saved, now)
    information = {key: pair for key, pair in changes.items() if _is_about(key, INFORMATION)}
    changes = {
        key: pair
        for key, pair in changes.items()
        if key not in information and not (resized and _is_about(key, WORLD))
    }
    decisive = {key: pair for key, pair in changes.items() if _is_about(key, DECISIVE)}
    if decisive:
        raise UserError(
            f"{checkpoint} cannot be continued by this command, it is of another model or recipe:\n"
            f"{listed(decisive)}\nPut the old values back, or begin anew in another --output_dir."
        )
    if changes and not accept:
        raise UserError(
            f"{checkpoint} was written with another recipe, and going on would give what neither gives:\n"
            f"{listed(changes)}\nPut the old values back, begin anew in another --output_dir, or accept the change "
            "with --allow_changed_recipe true."
        )
    if changes:
        say(f"going on with a changed recipe:\n{listed(changes)}")
    if information:
        say(f"the last bits may differ from an undisturbed run, since these changed:\n{listed(information)}")
    return changes


# The trainers' part


class ResumableTrainer(Trainer):
    """Mixed into the libraries' trainers; identical to them except:

    a checkpoint is declared whole by a manifest, and rotation keeps whole ones; a resumed run takes up what the
    library forgets (the loss since the last log, the trackers' means, the callbacks' counts, time spent), does not
    train on where the last step was done, and groups rows by length as it did before.
    """

    stage = None  # set by `Stage.announce`
    last_saved: int | None = None
    earlier_seconds = 0.0  # of training before the interruption

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.last_saved == step:
            return  # asked for twice, as by --save_steps and a signal
        if self.args.should_save:
            delete_checkpoint(checkpoint)  # a broken one, or of a run that was given up
        barrier()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        torch.save(self._run_state(), checkpoint / f"run_state_{self.args.process_index}.pth")
        if self.args.should_save:
            write_json(checkpoint / RECIPE, self.stage.recipe if self.stage else {})
            for log in Path(self.args.output_dir).glob("*.jsonl"):
                shutil.copy(log, checkpoint)
        barrier()
        if self.args.should_save:
            write_manifest(checkpoint, step=step, processes=self.args.world_size)
            best = self.state.best_model_checkpoint
            rotate(checkpoint.parent, limit, [checkpoint, *([Path(best)] if best else [])])
        self.last_saved = step

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
        super()._load_optimizer_and_scheduler(checkpoint)
        changes = self.stage.changes if self.stage and checkpoint else {}
        if not changes:
            return
        old, new = changes.get("learning_rate", (1, 1))
        schedule = self.lr_scheduler
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [rate * new / old for rate in schedule.base_lrs]
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] *= new / old
            if "initial_lr" in group:
                group["initial_lr"] *= new / old
            if hasattr(schedule, "lr_lambdas"):  # the next step's, by the new schedule
                group["lr"] = schedule.base_lrs[index] * schedule.lr_lambdas[index](schedule.last_epoch)
            if "weight_decay" in changes and group.get("weight_decay"):
                group["weight_decay"] = self.args.weight_decay
            if "betas" in group:
                group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)

    def _run_epoch(self, *args, start_time, **kwargs):
        self.train_began = start_time
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, start_time=start_time, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier_seconds)


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

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and (state.epoch == int(state.epoch) or state.global_step >= state.max_steps):
            control.should_save, self.postponed = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.postponed
        self.postponed = False


def restore_logs(checkpoint: Path, output_dir: Path) -> None:
    """Cut the logs of a stage directory back to what they were at a checkpoint."""
    for log in output_dir.glob("*.jsonl"):
        if not (checkpoint / log.name).exists():
            log.unlink()
    for log in checkpoint.glob("*.jsonl"):
        partial = output_dir / f".{log.name}.partial"
        shutil.copy(log, partial)
        partial.replace(output_dir / log.name)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
