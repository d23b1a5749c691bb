"""Checks of the precision, and of how a step's loss is averaged."""

import torch

from minimind.common.launch import bf16_is_fast
from minimind.doctor.registry import Case, check


@check("args")
def fp16_scaling(case: Case) -> tuple:
    args = case.args
    scale = (case.deepspeed or {}).get("fp16", {}).get("loss_scale", 0)
    parameters = case.model.parameters() if case.model else ()
    if next((p.dtype for p in parameters if p.requires_grad), None) == torch.float16:
        expected = "fp32 weights: fp16 has no room for small updates"
        fix = "Load the weights in fp32 (dtype float32) and set fp16: true, or use bf16."
        return "error", "the trained weights are fp16", expected, fix
    if not args.fp16:
        return "ok", "no fp16"
    if scale:
        expected = "a scale that moves: small gradients become 0"
        fix = 'Write "loss_scale": 0, or better use bf16.'
        return "error", f"a fixed loss_scale of {scale}", expected, fix
    if args.use_cpu or args.device.type == "cpu":
        expected = "bf16 or fp32: no gradient scaler works there"
        return "error", "fp16 on a CPU", expected, "Set bf16, or neither."
    return "ok", "fp16 with a loss scale that moves"


@check("args")
def bf16_hardware(case: Case) -> tuple:
    device = case.args.device.type
    if not case.args.bf16:
        return "ok", "no bf16"
    if bf16_is_fast(device):
        return "ok", "computed natively"
    found, expected = f"bf16 on a {device} that emulates it", "hardware that computes in bf16"
    fix = (
        "Leave bf16 out (it is chosen where it is fast), or set bf16: false; on older GPUs"
        " fp16: true."
    )
    return "warning", found, expected, fix


@check("args")
def accumulation(case: Case) -> tuple:
    if case.spec.pairs or case.spec.family == "kto":
        return "ok", "a mean over pairs or replies; every micro-batch has as many"
    if case.args.average_tokens_across_devices:
        return "ok", "a mean over all trained tokens of a step"
    return (
        "error" if case.world > 1 else "warning",
        "average_tokens_across_devices is off",
        "a mean over the trained tokens of all processes",
        "Leave average_tokens_across_devices out: processes with fewer trained tokens would weigh"
        " more.",
    )
