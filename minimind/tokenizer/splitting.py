r"""The rules by which a tokenizer splits text before merging, under the names llama.cpp has for
them.

A GGUF file stores the name and not the rule, and a wrong name gives other tokens without any error.
So a tokenizer is trained only with rules that are named here; each is the one that the tokenizer
which gave the name publishes, and llama.cpp gives the same ids. What they make of "，但是 I've
1234\n\nA":

    qwen2   |，但是| I|'ve| |1|2|3|4|\n\n|A|   digits alone; a word keeps one sign before it
    qwen35  the same, and combining marks stay with their letters
    smollm  |，|但是| I|'ve| |1|2|3|4|\n|\n|A| GPT-2's, with digits alone
    gpt-2   |，|但是| I|'ve| 1234|\n|\n|A|     signs apart from words, whole numbers
"""

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# Digits alone, because a number is then composed instead of memorised; a run of newlines is one
# piece.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pieces(pattern: str) -> Sequence:
    return Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "qwen2": _pieces(SPLIT_PATTERN),
    "qwen35": _pieces(QWEN35_PATTERN),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "gpt-2": ByteLevel(add_prefix_space=False),
}


def splitting(rule: PreTokenizer | None) -> str | None:
    """What a splitting rule does, as text; where the offsets of tokens begin does not count."""
    return rule and rule.__getstate__().decode().replace(
        '"trim_offsets":false', '"trim_offsets":true'
    )


def splitting_name(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's name of a tokenizer's splitting rule; None for a rule that is not one of
    `PRE_TOKENIZERS`."""
    rule = splitting(tokenizer.pre_tokenizer)
    return next((name for name, known in PRE_TOKENIZERS.items() if splitting(known) == rule), None)
