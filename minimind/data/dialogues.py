"""A dialogue in one string, "Human: ... Assistant: ...", -> its messages."""

import re
from itertools import cycle

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
    """The messages of a string that begins with a voice and has both; None for any other string.

    An empty reply at the end, which asks to be continued, is left out.

    Raises:
        BadRowError: the voices do not alternate, beginning with the user's.
    """
    voices = list(VOICE.finditer(text))
    roles = [voice.lastgroup for voice in voices]
    if not {"user", "assistant"} <= set(roles) or text[: voices[0].start()].strip():
        return None
    if any(
        role != expected
        for role, expected in zip(roles, cycle(("user", "assistant")), strict=False)
    ):
        names = ", ".join(voice.group().strip() for voice in voices[:6])
        raise BadRowError(
            f"{name}: found a dialogue in one string with the voices {names}, expected them in turn"
        )
    ends = [*(voice.start() for voice in voices[1:]), len(text)]
    contents = [text[v.end() : end].strip() for v, end in zip(voices, ends, strict=True)]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
