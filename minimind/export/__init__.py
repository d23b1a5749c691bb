"""`minimind export`: a stage directory in another format, compared with the source before it
appears."""

import copy
import inspect
import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from minimind.common.directories import new_directory
from minimind.common.errors import UserError
from minimind.common.files import write_json
from minimind.export.gguf import require_gguf, rounded, write_gguf
from minimind.export.instructions import write_modelfile
from minimind.export.layouts import (
    FORMATS,
    STOCK,
    natural_layout,
    obstacles,
    save_for_all_versions,
    stock_model,
)
from minimind.export.prompts import speaker
from minimind.export.verification import (
    Probes,
    check_llama_cpp,
    check_model,
    check_tensors,
    check_tokenizer,
    largest_difference,
    logits_of,
    make_probes,
)
from minimind.export.web import wllama, write_page
from minimind.sharing import write_model_card
from minimind.stage_directory import (
    auto_class,
    check_vocabulary,
    holds_reward_model,
    library_versions,
    load_config,
    load_model,
    provenance,
    require_stage,
)
from minimind.tokenizer import load_tokenizer

DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def export(directory: str | Path, out: str | Path, format: str, dtype: str | None = None) -> dict:
    """Write the model of a stage directory to directory `out`, and return its `export.json`.

    Args:
        format: one of FORMATS, or "web"; "gguf" writes `model.gguf`, "web" a page that holds one.
        dtype: one of DTYPES, "q8_0" only for GGUF and pages; by default "q8_0" in a page, else that
            of the saved weights, or of an adapter's base.

    Raises:
        UserError: the format cannot express the model, or the written model differs from the
            source. `out` does not appear then.
    """
    path = require_stage(directory)
    as_gguf = format in ("gguf", "web")
    if as_gguf:
        require_gguf(format)
    saved = str(load_config(path).dtype or "float32").removeprefix("torch.")
    dtype = dtype or ("q8_0" if format == "web" else saved)
    if dtype not in DTYPES or (dtype == "q8_0" and not as_gguf):
        raise UserError(
            f"--dtype {dtype} does not go with --format {format}. Choose float32, float16 or"
            " bfloat16."
        )
    source = load_model(path, scores=holds_reward_model(path)).eval()
    tokenizer = load_tokenizer(path)
    check_vocabulary(source, tokenizer, path)
    if reasons := obstacles(source.config, "gguf" if as_gguf else format):
        fitting = [name for name in FORMATS if not obstacles(source.config, name)]
        raise UserError(
            f"--format {format} cannot express this model: {'; '.join(reasons)}. Possible:"
            f" {', '.join(fitting)}."
        )

    program = wllama() if format == "web" else {}
    with new_directory(out) as partial:
        write = write_gguf_directory if as_gguf else write_layout
        record = {
            "format": format,
            "dtype": dtype,
            "source": provenance(path),
            "libraries": library_versions(),
            "verification": write(source, tokenizer, format, dtype, partial),
        }
        if as_gguf:
            facts = speaker(source, tokenizer, record["source"]["stage"])
        if format == "gguf":
            record["commands"] = write_modelfile(partial, facts, dtype)
        if format == "web":
            file = partial / "model.gguf"
            write_page(partial, file, dtype, facts, program)
            file.unlink()  # the page holds it
        write_json(partial / "export.json", record)
        write_model_card(partial)
    return record


def with_weights(
    source: PreTrainedModel, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    """A copy of a model with `change` applied to each parameter; the buffers stay in fp32."""
    model = copy.deepcopy(source)
    for name, parameter in model.named_parameters():
        parameter.data = change(name, parameter.data)
    return model


def write_layout(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, format: str, dtype: str, out: Path
) -> dict:
    """Write a layout of the library, or our own with its code; returns the results of the
    comparison."""
    target = getattr(torch, dtype)
    reference = with_weights(source, lambda name, weight: weight.to(target).float())
    probes = make_probes(reference, tokenizer)
    model = stock_model(reference, format) if format in STOCK else reference
    tensors = model.state_dict()
    if format in STOCK:
        save_for_all_versions(model.to(target), tokenizer, out)
        reloaded = auto_class(model.config).from_pretrained(
            out, dtype=torch.float32, trust_remote_code=False
        )
    else:
        model.config.use_cache = True
        model.to(target).save_pretrained(out)
        tokenizer.save_pretrained(out)
        # The code in the directory itself; the Auto classes would load the package's.
        name = f"modeling_minimind.{type(model).__name__}"
        shipped_class = get_class_from_dynamic_module(name, out)
        reloaded = shipped_class.from_pretrained(out, dtype=torch.float32)
    reloaded_tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    compared = compare(source, probes, tensors, reloaded, tokenizer, reloaded_tokenizer)
    if format not in STOCK:  # remove the library's copy of the code, as the directory is temporary
        shutil.rmtree(Path(inspect.getfile(shipped_class)).parents[1])
    return compared


def write_gguf_directory(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, format: str, dtype: str, out: Path
) -> dict:
    """Write `model.gguf`; returns how transformers and, if installed, llama.cpp read it."""
    layout, file = natural_layout(source.config), out / "model.gguf"
    model = stock_model(source, layout)
    write_gguf(model, source.model.rotary_emb.attention_scaling, layout, tokenizer, dtype, file)
    reference = with_weights(source, lambda name, weight: rounded(name, weight, dtype))
    probes = make_probes(reference, tokenizer)
    # Without a config, the library assumes a head_dim of 128 and no RoPE scaling for a GGUF file.
    with redirect_stderr(io.StringIO()):  # a progress bar
        reloaded = type(model).from_pretrained(
            out, gguf_file=file.name, config=model.config, dtype=torch.float32
        )
    reloaded.generation_config = source.generation_config
    exported_tokenizer = PreTrainedTokenizerFast.from_pretrained(out, gguf_file=file.name)
    compared = compare(
        source, probes, reference.state_dict(), reloaded.eval(), tokenizer, exported_tokenizer
    )
    compared["read_back_by"] += ", given the config"
    return compared | {"llama.cpp": check_llama_cpp(probes, tokenizer, file, dtype)}


def compare(
    source: PreTrainedModel,
    probes: Probes,
    tensors: dict[str, torch.Tensor],
    reloaded: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    reloaded_tokenizer: PreTrainedTokenizerFast,
) -> dict:
    """Raises UserError unless what was read back equals what was written; returns the figures."""
    check_tensors(tensors, reloaded.state_dict())
    rounding = largest_difference(logits_of(source, probes.sequences), probes.logits)
    return {
        "read_back_by": f"{type(reloaded).__module__.split('.')[0]}.{type(reloaded).__name__}",
        "tensors_bitwise_equal": len(tensors),
        **check_model(probes, reloaded),
        **check_tokenizer(tokenizer, reloaded_tokenizer),
        "max_logit_change_by_rounding": rounding,
    }
