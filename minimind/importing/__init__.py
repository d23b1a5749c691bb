"""`minimind import`: a checkpoint of MiniMind 1 to 3, Llama or Qwen3 (MoE) -> a stage directory.

Code that comes with a checkpoint is never run: configurations are read as JSON, pickles with
`weights_only=True`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from minimind import MiniMindForCausalLM
from minimind.common.directories import new_directory
from minimind.common.files import write_json
from minimind.importing.configurations import read_config, resolve
from minimind.importing.layouts import canonical, halve_rotary_pairs
from minimind.importing.side_files import read_generation_config, read_tokenizer, take_special_ids
from minimind.importing.weights import build_model, read_tensors
from minimind.sharing import write_model_card
from minimind.stage_directory import weights_hash
from minimind.tokenizer import tokenizer_hash


@dataclass
class Report:
    """Fields `inferred` from shapes, fields `assumed` because nothing shows them, and `notes`."""

    source: str
    layout: str
    inferred: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    **options: Any,
) -> tuple[MiniMindForCausalLM, Report]:
    """Read a published checkpoint and write it to `destination` as a stage directory.

    The weights keep their dtype. MiniMind's interleaved RoPE becomes ours by a permutation of the
    rows of q and k.

    Args:
        source: a HuggingFace folder, or one file of weights (.pth, .pt, .bin, .safetensors).
        destination: the directory to write; it must not exist or be empty. It appears complete or
            not at all.
        config: a JSON with fields of the model, ours or theirs, instead of the source's
            config.json.
        tokenizer: a directory with tokenizer.json, instead of the source's.
        options: fields that override all others (`num_attention_heads`, `rope_theta`), unless they
            are None.

    Raises:
        UserError: something cannot be read or expressed, or tensors and configuration do not fit.
    """
    source, destination = Path(source), Path(destination)
    with new_directory(destination) as partial:
        model, loaded, report = read_checkpoint(source, config, tokenizer, options)
        model.save_pretrained(partial)
        if loaded:
            loaded.save_pretrained(partial)
        record = {
            "stage": "import",
            "parent": None,
            "pipeline": destination.absolute().name,
            "weights": weights_hash(partial),
            **({"tokenizer": tokenizer_hash(loaded)} if loaded else {}),
            **asdict(report),
        }
        write_json(partial / "stage.json", record)
        if loaded:
            write_model_card(partial)
    return model, report


def read_checkpoint(
    source: Path, config: str | Path | None, tokenizer: str | Path | None, options: dict[str, Any]
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerFast | None, Report]:
    """Model and tokenizer of a published checkpoint; see `import_checkpoint`."""
    raw, origin = read_config(source, config)
    tensors, generation, notes = canonical(read_tensors(source), raw, source)
    model_config, inferred, assumed = resolve(tensors, generation, raw, origin, options)
    loaded = read_tokenizer(Path(tokenizer or source), bool(tokenizer), notes)
    if loaded:
        take_special_ids(model_config, loaded, tokenizer or source)
    if generation.interleaved:
        halve_rotary_pairs(tensors, model_config.head_dim)
    model = build_model(tensors, model_config, source)
    read_generation_config(source, model, notes)
    return model, loaded, Report(str(source), generation.name, inferred, assumed, notes)
