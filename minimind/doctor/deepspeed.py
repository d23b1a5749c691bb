"""Checks of a DeepSpeed JSON against its recipe."""

import json

from minimind.doctor.registry import Case, check, value_of
from minimind.training.definition import flat

# Paths in a DeepSpeed JSON where transformers replaces "auto" (integrations/deepspeed.py); nothing
# replaces it elsewhere.
FILLED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    *(f"optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")),
    *(f"scheduler.params.warmup_{name}" for name in ("min_lr", "max_lr", "num_steps")),
    "scheduler.params.total_num_steps",
}
# Old keys and their new names
RENAMED = {
    "zero_optimization.cpu_offload": "offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_params": "offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory inside offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.elastic_checkpoint": "the universal checkpoint",
    "bfloat16": "bf16",
}


@check("deepspeed")
def deepspeed_optimizer(case: Case) -> tuple:
    if "optimizer" not in case.deepspeed:
        return "ok", "the recipe's optimizer"
    block, rate = case.deepspeed["optimizer"], case.args.learning_rate
    found = f"an optimizer block ({block.get('type', '?')}, {block.get('params', {})})"
    expected = (
        "none: optim, learning_rate and weight_decay are set in the recipe (learning_rate"
        f" {rate:g})"
    )
    return "error", found, expected, "Remove 'optimizer' from the DeepSpeed JSON."


@check("deepspeed")
def deepspeed_scheduler(case: Case) -> tuple:
    if "scheduler" not in case.deepspeed:
        return "ok", "the recipe's schedule"
    found = f"a scheduler block ({case.deepspeed['scheduler'].get('type', '?')})"
    schedule = value_of(case.args.lr_scheduler_type)
    expected = f"none: it would silently take the place of lr_scheduler_type {schedule}"
    return "error", found, expected, "Remove 'scheduler' from the DeepSpeed JSON."


@check("deepspeed")
def deepspeed_batch(case: Case) -> tuple:
    wanted = {
        "train_micro_batch_size_per_gpu": case.args.per_device_train_batch_size,
        "gradient_accumulation_steps": case.args.gradient_accumulation_steps,
        "train_batch_size": case.rows_per_step,
    }
    written = {name: case.deepspeed[name] for name in case.deepspeed if name in wanted}
    wrong = [name for name, value in written.items() if value not in ("auto", wanted[name])]
    if not wrong:
        return "ok", f"{case.rows_per_step:,} rows per step"
    found, expected = (
        ", ".join(f"{name} {of[name]}" for name in wrong) for of in (written, wanted)
    )
    fix = 'Write "auto" in the DeepSpeed JSON: batches are the recipe\'s.'
    return "error", found, expected, fix


@check("deepspeed")
def deepspeed_precision(case: Case) -> tuple:
    args, wrong = case.args, []
    wanted = {"bf16": bool(args.bf16), "fp16": bool(args.fp16)}
    for name, value in wanted.items():
        enabled = case.deepspeed.get(name, {}).get("enabled", False)
        if enabled != "auto" and bool(enabled) != value:
            wrong.append(f"{name}.enabled {json.dumps(enabled)}")
    if not wrong:
        return "ok", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    expected = ", ".join(f"{name} {json.dumps(value)}" for name, value in wanted.items())
    fix = 'Write {"enabled": "auto"} for both.'
    return "error", ", ".join(wrong), f"{expected}, as in the recipe", fix


@check("deepspeed")
def deepspeed_clipping(case: Case) -> tuple:
    norm, wanted = case.deepspeed.get("gradient_clipping"), case.args.max_grad_norm
    if norm in ("auto", wanted) or (norm is None and not wanted):
        return "ok", f"gradients are clipped at {wanted:g}"
    found = "no gradient_clipping: no clipping" if norm is None else f"gradient_clipping {norm}"
    fix = 'Write "gradient_clipping": "auto" in the DeepSpeed JSON.'
    return "error", found, f"max_grad_norm {wanted:g}", fix


@check("deepspeed")
def deepspeed_auto(case: Case) -> tuple:
    unfilled = [k for k, value in flat(case.deepspeed) if value == "auto" and k not in FILLED]
    if not unfilled:
        return "ok", "every auto is replaced"
    fix = "Write a number, or leave it out."
    return "error", f"auto for {', '.join(unfilled)}", "a value: nothing replaces it", fix


@check("deepspeed")
def deprecated_keys(case: Case) -> tuple:
    keys = {key for key, _ in flat(case.deepspeed)} | set(case.deepspeed)
    old = {key: new for key, new in RENAMED.items() if key in keys}
    if not old:
        return "ok", "none"
    fix = "; ".join(f"{key} -> {new}" for key, new in old.items())
    return "warning", ", ".join(old), "names that the installed DeepSpeed knows", fix
