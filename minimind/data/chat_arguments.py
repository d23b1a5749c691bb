"""The options by which conversations (SFT, LoRA) and preference pairs (DPO, the reward model)
become rows."""

from dataclasses import dataclass, field
from typing import Any

from minimind.data.templates import TEMPLATES

CHOICES = {
    "long_prompts": ("cut", "drop"),
    "long_completions": ("cut", "drop"),
    "long_conversations": ("keep_last", "keep_first", "split", "drop"),
    "train_turns": ("all", "last", "flags"),
    "loss_normalization": ("token", "conversation"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TemplateArguments:
    """What rows of conversations and of pairs share; checks the choices of both."""

    chat_template: str | None = _option(
        None, f"{', '.join(TEMPLATES)}, or a .jinja file. Default: the tokenizer's own (chatml)."
    )

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if (value := getattr(self, name, choices[0])) not in choices:
                raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}")


@dataclass
class PreferenceArguments(TemplateArguments):
    """How preference pairs become rows; see preference_rows.py."""

    max_prompt_length: int = _option(256, "Tokens of a prompt at most, see --long_prompts.")
    max_completion_length: int = _option(256, "Tokens of a reply at most, see --long_completions.")
    long_prompts: str = _option(
        "cut",
        "What becomes of a pair with a prompt longer than --max_prompt_length. cut: it loses its"
        " oldest turns, then its system message, then the beginning of its last question; drop: the"
        " pair is left out.",
    )
    long_completions: str = _option(
        "cut",
        "What becomes of a pair with a reply longer than --max_completion_length. cut: the reply"
        " loses its end, and the other one its end token; drop: the pair is left out.",
    )


@dataclass
class ChatArguments(TemplateArguments):
    """How conversations become rows."""

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

    @property
    def needs_weights(self) -> bool:
        """Whether tokens may count differently in the loss."""
        return bool(self.weighted_loss) or self.loss_normalization != "token"
