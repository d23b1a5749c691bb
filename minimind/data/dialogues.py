"""A dialogue in one string -> its messages."""

import re

from minimind.common.errors import BadRowError
from minimind.data.messages import Message

VOICES = {
    "user": "human|user|用户|人类|问",
    "assistant": "assistant|ai|bot|gpt|chatgpt|助手|助理|答",
}
VOICE = re.compile(
    r"(?:(?:^|\n)[ \t]*(?:#{2,3}[ \t]*)?|#{3}[ \t]*)"
    + rf"(?:(?P<user>{VOICES['user']})|(?P<assistant>{VOICES['assistant']}))[ \t]*[:：]",
    re.IGNORECASE,
)


def split_dialogue(text: str, name: str) -> list[Message] | None:
    """One string with both voices, "Human: ... Assistant: ...", -> its messages; None where it is
    no dialogue.

    A last, empty reply, which asks to be continued, is left out.

    Raises:
        BadRowError: the text begins as a dialogue, and its voices do not alternate.
    """
    found = list(VOICE.finditer(text))
    if (
        not found
        or text[: found[0].start()].strip()
        or not {"user", "assistant"} <= {m.lastgroup for m in found}
    ):
        return None
    ends = [*(match.start() for match in found[1:]), len(text)]
    messages = [
        {"role": match.lastgroup, "content": text[match.end() : end].strip()}
        for match, end in zip(found, ends, strict=True)
    ]
    expected = ("user", "assistant")
    if any(message["role"] != expected[index % 2] for index, message in enumerate(messages)):
        voices = ", ".join(match.group().strip() for match in found[:6])
        raise BadRowError(
            f"{name}: found a dialogue in one string with the voices {voices}, expected them in"
            " turn"
        )
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
