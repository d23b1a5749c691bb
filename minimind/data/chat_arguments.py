"""The options by which conversations become rows, of SFT, LoRA and DPO."""

from dataclasses import dataclass, field
from typing import Any

from minimind.data.templates import TEMPLATES

CHOICES = {
    "long_conversations": ("keep_last", "keep_first", "split", "drop"),
    "train_turns": ("all", "last", "flags"),
    "loss_normalization": ("token", "conversation"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ChatArguments:
    """How conversations become rows."""

    chat_template: str | None = _option(
        None, f"{', '.join(TEMPLATES)}, or a .jinja file. Default: the tokenizer's own (chatml)."
    )
    long_conversations: str = _option(
        "keep_last",
        "What of a conversation longer than --max_length is used. keep_last: system prompt and the"
        " last turns that fit; keep_first: the first replies that fit; split: all turns, as several"
        " rows, each with the system prompt; drop: nothing. Replies are never cut; a conversation"
        " of which no turn fits is dropped.",
    )
    train_turns: str = _option(
        "all",
        "Which replies are trained. all; last: the last one of each conversation; flags: those with"
        " 'train': true or a 'weight' above 0. 'train': false and 'weight': 0 are obeyed always.",
    )
    loss_normalization: str = _option(
        "token",
        "token: each trained token of a step counts alike; conversation: each conversation does.",
    )
    weighted_loss: bool | None = _option(
        None,
        "Multiply losses by the 'weight' of rows and messages; false: ignore it. Default: an error"
        " where a weight is other than 0 and 1.",
    )

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}")

    @property
    def needs_weights(self) -> bool:
        """Whether tokens may count differently in the loss."""
        return bool(self.weighted_loss) or self.loss_normalization != "token"
