"""Words of a text in any language: Chinese does not separate them, so each of its characters is
one."""

import re

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HAN_CHARACTER = re.compile(f"[{HAN}]")
UNIT = re.compile(rf"[{HAN}]|[^\W{HAN}]+")


def units_of(text: str) -> list[str]:
    """A text -> its units: each Chinese character, and each run of other letters and digits.

    >>> units_of("用 torch.nn 训练")
    ['用', 'torch', 'nn', '训', '练']
    """
    return UNIT.findall(text)


def is_chinese(text: str, units: int) -> bool:
    """Whether at least half of the `units` of a text are Chinese characters."""
    return 2 * len(HAN_CHARACTER.findall(text)) >= max(units, 1)
