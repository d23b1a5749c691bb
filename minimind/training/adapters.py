"""The adapters of `--use_peft`, by peft's own classes; docs/adapters.md says when to take which."""

from collections.abc import Mapping

from peft import IA3Config, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from trl import ModelConfig, get_peft_config

from minimind import MiniMindConfig
from minimind.common.errors import UserError

VIRTUAL = ("prompt_tuning", "prefix_tuning")  # virtual tokens in front of the text, no weights
ADAPTERS = ("lora", "ia3", *VIRTUAL)


def peft_config(args: ModelConfig) -> PeftConfig | None:
    """The adapter that the options describe, or None.

    IA3 scales keys, values and the inputs of the feed-forward's last product (Liu et al., 2022,
    eq. 5 and 6). Virtual tokens begin as embeddings of random tokens of the vocabulary (Lester et
    al., 2021, section 3.2), those of prefix tuning as random keys and values (Li and Liang, 2021).
    """
    if not args.use_peft or args.peft_type == "lora":
        return get_peft_config(args)
    if args.peft_type == "ia3":
        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": args.num_virtual_tokens}
    if args.peft_type == "prompt_tuning":
        return PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **options)
    return PrefixTuningConfig(**options)


def fit_virtual_tokens(
    args, options, lengths: Mapping[str, int], config: MiniMindConfig
) -> str | None:
    """Turn packing off where the adapter has virtual tokens; returns a notice of it.

    `args` are the options of the model, `options` of the training, `lengths` those of which the sum
    is the length of a row.

    Raises:
        UserError: something else does not go together with virtual tokens.
    """
    if not getattr(args, "use_peft", False) or args.peft_type not in VIRTUAL:
        return None
    kind, tokens, length = args.peft_type, args.num_virtual_tokens, sum(lengths.values())
    if not hasattr(options, "packing"):
        raise UserError(
            f"--peft_type {kind}: preference training compares replies in rows that share their"
            " prompt, where virtual tokens have no place. Train LoRA or IA3, or merge one of them"
            " first."
        )
    if length + tokens > config.max_position_embeddings:
        raise UserError(
            f"--max_length {length:,} and {tokens:,} virtual tokens are beyond the model's"
            f" max_position_embeddings ({config.max_position_embeddings:,}). Lower one of them."
        )
    checkpointing = options.activation_checkpointing or options.gradient_checkpointing
    if kind == "prefix_tuning" and checkpointing:
        raise UserError(
            "--activation_checkpointing drops the keys and values that prefix tuning trains. Leave"
            " it out."
        )
    if not options.packing:
        return None
    options.packing = options.eval_packing = False
    return (
        "packing is off: virtual tokens stand in front of a row, where the conversations behind the"
        " first would not see them as their own"
    )
