"""One run of a stage: where it starts, what it says, and the stage directory it writes (see checkpoints.py)."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from enum import Enum
from functools import cached_property
from math import ceil
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import align_special_tokens

from minimind import MiniMindConfig
from minimind.checkpoints import (
    check_vocabulary,
    library_versions,
    load_model,
    provenance,
    read_stage,
    require_stage,
    weights_hash,
)
from minimind.errors import UserError
from minimind.evaluation import bits_per_nat, token_loss_distribution, token_losses
from minimind.language import say, translated
from minimind.records import write_json
from minimind.tokenizer import load_tokenizer, tokenizer_hash
from minimind.training.arguments import load_model_config_file
from minimind.training.callbacks import (
    Baseline,
    ChangeCallback,
    EarlyStopping,
    ProgressCallback,
    RouterLoadCallback,
)
from minimind.training.elastic import Batch, prepare_checkpoint, share_last_rows
from minimind.training.guards import install_guards, reports_disk_errors
from minimind.training.heartbeat import HeartbeatCallback
from minimind.training.launch import is_main_process, leave_process_group
from minimind.training.output_directory import unlock_directory
from minimind.training.plots import plot_loss
from minimind.training.report import ReportCallback, loss_unit, read_log, title_of, write_report
from minimind.training.resume import ResumeCallback, recipe_of
from minimind.training.samples import SampleCallback, read_prompts
from minimind.training.signals import InterruptCallback
from minimind.training.starting import begin

# An old name that accelerate 1.15 and DeepSpeed 0.19 still call, torch 2.13 has renamed the collective; nothing a user
# could mend.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def new_model(config_file: str, tokenizer: PreTrainedTokenizerFast, attn_implementation: str | None = None):
    """A MiniMind with random weights, its vocabulary and special ids those of the tokenizer.

    Raises:
        UserError: the file is wrong, or its vocabulary is too small for the tokenizer.
    """
    check_attention(attn_implementation)
    fields = load_model_config_file(config_file)
    fields.setdefault("vocab_size", len(tokenizer))
    try:
        config = MiniMindConfig(
            **fields,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"{config_file}: {error.__cause__ or error}") from error
    check_vocabulary(model, tokenizer, config_file)
    return model


def starting_point(
    given: str | None, attn_implementation: str | None = None, default: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Path | None]:
    """Model, tokenizer and directory of the stage that the next one starts from.

    Without a given directory it is `default`; where that does not exist either, a tiny model with random weights and
    the default tokenizer, so that every script runs by itself.
    """
    if given is None and not (default and (Path(default) / "stage.json").exists()):
        if is_main_process():
            say(f"no stage at {default}: starting from a tiny model with RANDOM weights (--model_name_or_path)")
        tokenizer = load_tokenizer()
        return new_model("configs/model/tiny.json", tokenizer, attn_implementation), tokenizer, None
    path = require_stage(given or default)
    check_attention(attn_implementation)
    tokenizer = load_tokenizer(path)
    model = load_model(path, attn_implementation)
    check_vocabulary(model, tokenizer, path)
    return model, tokenizer, path


def check_attention(attn_implementation: str | None) -> None:
    """Raises UserError where a back-end cannot train here, which the libraries say in the first backward at best."""
    if attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError(
            "--attn_implementation flex_attention has no backward without a GPU. Leave it out: sdpa is the default."
        )


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that DPO compares with; TRL would otherwise load one from the path in the config, which a merged or
    random model has not."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def check_length(name: str, length: int, config: MiniMindConfig) -> None:
    """Raises UserError where rows are longer than the model has positions, or too short to predict anything."""
    if length > config.max_position_embeddings:
        raise UserError(
            f"--{name} {length:,} is beyond the model's max_position_embeddings ({config.max_position_embeddings:,}). "
            f"Lower --{name}, or train a model with more positions."
        )
    if length < 2:
        raise UserError(f"--{name} is {length}, expected at least 2: a row predicts each token from those before it.")


class Stage:
    """One run of a stage: says what it will do, keeps its record, writes its directory.

    `data` is what the loaders return: `eval`, the held-out rows or None, and `facts`, what was counted. `options`: the
    other dataclasses of arguments that decide the result. After it `args.resume_from_checkpoint` is the checkpoint to
    go on from, or None; see starting.py.

    Raises:
        UserError: the output directory is the parent or holds it, or see `starting.begin`.
        SystemExit: the stage is complete already.
    """

    def __init__(
        self,
        name: str,
        args: transformers.TrainingArguments,
        data,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        parent: Path | None = None,
        options: Iterable = (),
    ):
        options = list(options)
        adapter = any(getattr(each, "use_peft", False) for each in options)
        self.name = name
        self.kind = "lora" if adapter and name == "sft" else name  # what it calls itself, as recipes and plans do
        self.args = args
        self.facts = data.facts
        self.output_dir = Path(args.output_dir)
        self.parent = parent
        self.started = time.time()
        if parent and self.output_dir.resolve() in (parent.resolve(), *parent.resolve().parents):
            raise UserError(
                f"--output_dir {self.output_dir} is the stage this run starts from, or holds it. Give another one."
            )
        if data.eval is None:
            if args.load_best_model_at_end or args.early_stopping_patience is not None:
                raise UserError(
                    "choosing the best model and stopping early need held-out rows, and there are none. Give "
                    "--eval_files, or a larger --eval_ratio."
                )
            args.eval_strategy = IntervalStrategy.NO  # the Trainer refuses to evaluate on nothing
        align_special_tokens(model, tokenizer)  # a chat template may have brought another end token
        self.recipe = recipe_of(name, args, data, model, tokenizer, parent, options)
        pipeline = f"{self.output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.run, self.changes = begin(args, self.recipe, pipeline)
        args.eval_on_start = data.eval is not None and args.resume_from_checkpoint is None

    @cached_property
    def lineage(self) -> dict:
        """Parent directory, its weights' hash, and the id that all stages of one pipeline share."""
        if self.parent is None:
            return {"parent": None, "pipeline": self.run["pipeline"]}
        record = read_stage(self.parent)
        return {
            "parent": provenance(self.parent),
            "pipeline": record.get("pipeline") or self.parent.name,
        }

    @cached_property
    def description(self) -> dict:
        """What is known of the run before it begins."""
        return {
            "stage": self.kind,
            **self.lineage,
            "data": self.facts,
            "options": changed_options(self.args),
            "seed": self.args.seed,
            "git_commit": git_commit(),
            "command": " ".join(sys.argv),
            "python": sys.version.split()[0],
            "libraries": library_versions(),
        }

    def watch(self, trainer: Trainer) -> None:
        """Progress lines, samples, the report, early stopping."""
        args, tokenizer = self.args, trainer.processing_class
        trainer.remove_callback(PrinterCallback)
        self.progress = ProgressCallback(self.output_dir, trainer, bits_per_nat(self.facts["train"]))
        trainer.callback_handler.callbacks.insert(0, self.progress)
        if args.sample_steps >= 0:
            prompts = read_prompts(args.sample_prompts, chat=self.name != "pretrain")
            trainer.add_callback(
                SampleCallback(trainer, tokenizer, prompts, self.output_dir, args.sample_steps, args.sample_tokens)
            )
        if args.early_stopping_patience is not None:
            trainer.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
        if args.metric_for_best_model:
            trainer.add_callback(Baseline())
        trainer.add_callback(ReportCallback(self.output_dir, self.description))

    def announce(self, trainer: Trainer) -> None:
        """Print data, parameters and steps of the run to come, and let `trainer` report its progress in our lines."""
        if self.args.deepspeed and not trainer.is_deepspeed_enabled:
            raise RuntimeError(
                "--deepspeed was given, but accelerate left DeepSpeed out: check ACCELERATE_* variables"
            )
        self.watch(trainer)
        if getattr(trainer.model.config, "num_experts", 0):
            trainer.callback_handler.callbacks.insert(0, RouterLoadCallback(trainer.model))
        from minimind.planning.measuring import PlanCallback  # it plans stages, and so imports this module

        trainer.callback_handler.callbacks.insert(0, PlanCallback(trainer))
        trainer.stage = self
        trainer.add_callback(HeartbeatCallback())
        trainer.add_callback(InterruptCallback(trainer))
        if self.name != "dpo":  # TRL gathers the rewards of a micro-batch, which needs as many on every process
            share_last_rows(trainer)
        prepare_checkpoint(trainer)
        trainer.add_callback(ResumeCallback(trainer))
        install_guards(trainer, self.output_dir, ProgressCallback)
        trainer.add_callback(ChangeCallback(trainer))
        from minimind.doctor import examine_run  # it reads recipes too, and so needs this module

        examine_run(self.name, trainer, self.facts, self.parent)
        args, model, facts = self.args, trainer.model, self.facts
        world = args.world_size
        batch = Batch(world, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        epoch = ceil(len(trainer.train_dataset) / batch.rows)
        steps = args.max_steps if args.max_steps > 0 else ceil(epoch * args.num_train_epochs)
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not is_main_process():
            return
        console = Console(highlight=False, soft_wrap=True)
        start = args.resume_from_checkpoint or self.parent or "random weights"
        console.print(translated(f"[bold]{self.kind}[/] -> {self.output_dir}  (from {start})"))
        for part, title in (("train", "  train  "), ("eval", "  eval   ")):
            counts = {key: value for key, value in facts[part].items() if key != "files" and isinstance(value, int)}
            listed = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
            files = " ".join(facts[part]["files"]) or ("held out of the above" if part == "eval" else "")
            console.print(f"{translated(title)}{listed}  [dim]{translated(files)}[/]")
        active = active_parameters(model)
        shown = f"{parameters / 1e6:.2f} M"
        shown += translated(f" ({active / 1e6:.2f} M active)") if active < parameters else ""
        shown += translated(f", {trainable / 1e6:.2f} M trained") if trainable < parameters else ""
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "plain"
        console.print(translated(f"  model  {shown} parameters, {precision}, {args.device.type} x {world}, {engine}"))
        console.print(
            translated(
                f"  steps  {steps:,} of {batch}, learning rate "
                f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), seed {args.seed}"
            )
        )

    def finish(self, trainer: Trainer, tokenizer: PreTrainedTokenizerFast, metrics: dict, report: dict | None = None):
        """Write the stage directory, every file whole, `stage.json` last; all processes call it."""
        try:
            with reports_disk_errors(self.output_dir):
                self._write(trainer, tokenizer, metrics, report)
        finally:
            unlock_directory()
        leave_process_group(trainer)

    def _write(self, trainer: Trainer, tokenizer: PreTrainedTokenizerFast, metrics: dict, report: dict | None) -> None:
        partial = self.output_dir / ".partial"
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        save_model(trainer, partial)
        distribution = self.token_loss(trainer)
        if not is_main_process():
            return
        tokenizer.save_pretrained(partial)
        torch.save(self.args, partial / "training_args.bin")
        if report:
            write_json(partial / "mask_report.json", report)
        log = read_log(self.output_dir / "train_log.jsonl")
        plot_loss(log, partial / "loss.png", title_of(self.kind, self.output_dir), loss_unit(self.kind))
        state = trainer.state
        record = {
            **self.description,
            "weights": weights_hash(partial),
            "tokenizer": tokenizer_hash(tokenizer),
            "steps": state.global_step,
            "extended": self.run["extended"],
            "tokens_seen": int(state.num_input_tokens_seen),
            "tokens_per_second": round(self.progress.tokens_per_second(state), 1),
            "trained_share_per_role": report and {role: r["trained_share"] for role, r in report["roles"].items()},
            "metrics": metrics,
            "best": self.best(state),
            "token_loss": distribution,
            "seconds": round(time.time() - self.started, 1),
        }
        (self.output_dir / "stage.json").unlink(missing_ok=True)
        for stale in ("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"):
            (self.output_dir / stale).unlink(missing_ok=True)
        for file in partial.iterdir():
            file.replace(self.output_dir / file.name)
        partial.rmdir()
        write_report(self.output_dir, record)
        write_json(self.output_dir / "stage.json", record)
        say(f"report: {self.output_dir / 'report.html'}")
        say(f"{self.kind} is complete in {self.output_dir} after {record['seconds']:.0f} s")

    def best(self, state: TrainerState) -> dict | None:
        """The best evaluation by --metric_for_best_model; its step is 0 where none beat the start."""
        if state.best_metric is None:
            return None
        metric = self.args.metric_for_best_model
        logged = metric if metric.startswith("eval_") else f"eval_{metric}"
        # The state's own best step is that of a checkpoint, and there may be none.
        step = next((each["step"] for each in state.log_history if each.get(logged) == state.best_metric), 0)
        best = {"metric": metric, "value": float(state.best_metric), "step": step}
        if not best["step"]:
            say(f"no evaluation was better than the {best['metric']} {best['value']:.4f} before the first step")
        elif self.args.load_best_model_at_end:
            say(f"the best model is that of step {best['step']:,}: {best['metric']} {best['value']:.4f}")
        return best

    def token_loss(self, trainer: Trainer) -> dict | None:
        """How the loss of single held-out tokens is distributed; None for pairs, and where weights are spread."""
        alone = not is_deepspeed_zero3_enabled() and is_main_process()
        if self.name not in ("pretrain", "sft") or not isinstance(trainer.eval_dataset, Dataset) or not alone:
            return None
        losses = token_losses(trainer)
        return token_loss_distribution(losses) if len(losses) else None


def changed_options(args: transformers.TrainingArguments) -> dict:
    """Options of a run that are not the library's defaults, as JSON; without tokens, which the library masks."""
    given, changed = args.to_dict(), {}
    defaults = {field.name: field for field in (*dataclasses.fields(args), *dataclasses.fields(TrainingArguments))}
    for name, field in defaults.items():
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = default.value if isinstance(default, Enum) else default
        elsewhere = name.endswith("_token") or name in ("output_dir", "run_name", "local_rank")
        if name in given and given[name] != default and not elsewhere:
            changed[name] = given[name]
    return json.loads(json.dumps(changed, default=str))


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token passes: all, but of a layer's routed experts only those it visits."""
    config = model.config
    if not config.num_experts:
        return sum(p.numel() for p in model.parameters())
    idle = 1 - config.num_experts_per_tok / config.num_experts
    return round(sum(p.numel() * (1 - idle * (".experts." in name)) for name, p in model.named_parameters()))


def save_model(trainer: Trainer, directory: Path) -> None:
    """Save weights, config and model code; every process calls it, since sharded weights are gathered.

    Identical to `Trainer.save_model` except: a tied `lm_head.weight` is written once also under ZeRO, where accelerate
    clones the state dict and the library no longer sees that the two are one; `use_cache`, which training turns off,
    is on again; an adapter names its base by an absolute path.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_main_process():
        return
    # TRL shadows `forward` on the instance; the saved code is the class's, so nothing of it reaches the checkpoint.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for tied in base.all_tied_weights_keys:
        state_dict.pop(tied, None)
    base.config.use_cache = True
    if isinstance(model, PeftModel):
        name = model.active_adapter
        model.peft_config[name].base_model_name_or_path = str(Path(base.config._name_or_path).resolve())
    model.save_pretrained(directory, state_dict=state_dict)
    (directory / "README.md").unlink(missing_ok=True)  # peft's model card, a form with empty fields


def git_commit() -> str | None:
    """The commit of the project's checkout, with "+" where it has uncommitted changes; None outside of git."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None
