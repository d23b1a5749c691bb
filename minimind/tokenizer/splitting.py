r"""The rules by which a tokenizer splits text before merging, under llama.cpp's names.

A GGUF file stores the name, not the rule, and a wrong name produces other tokens without any error.
A tokenizer is therefore trained only with the rules named here. Each is published with the
tokenizer that its name refers to, and llama.cpp produces the same ids. They split "，但是 I've
1234\n\nA" into:

    qwen2   |，但是| I|'ve| |1|2|3|4|\n\n|A|   single digits; a word keeps one sign before it
    qwen35  the same, and combining marks stay with their letters
    smollm  |，|但是| I|'ve| |1|2|3|4|\n|\n|A| GPT-2's, with single digits
    gpt-2   |，|但是| I|'ve| 1234|\n|\n|A|     signs apart from words, entire numbers
"""

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# Single digits, so that numbers are composed instead of memorised; a run of newlines is one piece
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_pattern(pattern: str) -> Sequence:
    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(pattern), "isolated"), bytes_only])


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "qwen2": _by_pattern(SPLIT_PATTERN),
    "qwen35": _by_pattern(QWEN35_PATTERN),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "gpt-2": ByteLevel(add_prefix_space=False),
}


def splitting_name(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's name of a tokenizer's splitting rule; None for one that is not in
    `PRE_TOKENIZERS`."""
    state = _state(tokenizer.pre_tokenizer)
    return next((name for name, rule in PRE_TOKENIZERS.items() if _state(rule) == state), None)


def _state(rule: PreTokenizer | None) -> str | None:
    """What a rule does, as text; where it lets the offsets of tokens begin does not count."""
    trimmed = ('"trim_offsets":false', '"trim_offsets":true')
    return rule and rule.__getstate__().decode().replace(*trimmed)
