"""Personal data -> fixed placeholders: e-mail addresses, telephone, identity and card numbers,
public IPv4 addresses.

A number is masked only for its form *and* its check digit, prefix or punctuation, so that ordinary
numbers, dates, amounts, law articles, ISBN, versions and timestamps stay. Names and postal
addresses are out of reach of patterns.
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import ClassVar

from minimind.cleaning.options import closest
from minimind.cleaning.steps import Transform

PLACEHOLDERS = {
    "email": "[EMAIL]",
    "phone": "[PHONE]",
    "id_number": "[ID_NUMBER]",
    "bank_card": "[BANK_CARD]",
    "ip_address": "[IP_ADDRESS]",
}

# The lookarounds name ASCII on purpose: in Chinese a number often stands directly between two
# characters.
START, END = r"(?<![0-9A-Za-z_.+/=&%#-])", r"(?![0-9A-Za-z_]|[.-]\d)"

EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/:-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}+@(?P<domain>(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})"
    r"(?![A-Za-z0-9_-])"
)
RESERVED_DOMAINS = re.compile(
    r"(?:^|\.)(?:example(?:\.com|\.org|\.net|\.cn)?|test|invalid|localhost)$", re.IGNORECASE
)


MOBILE = rf"{START}(?:(?:\+|00)86[ -]?|86-)?1[3-9]\d(?P<gap>[ -]?)\d{{4}}(?P=gap)\d{{4}}{END}"
# Area codes: 10, 2x, and 3xx to 9xx; the hyphen, space or parentheses is what makes a landline of
# digits.
LANDLINE = (
    rf"{START}(?:(?:\+|00)86[ -]?)?(?:0(?:10|2\d|[3-9]\d\d)[ -]|[(（]0(?:10|2\d|[3-9]\d\d)[)）]["
    r" -]?)"
    rf"[2-8]\d{{2,3}}[ -]?\d{{4}}(?:[ -]?(?:转|ext\.?|x)[ -]?\d{{1,6}})?{END}"
)
# Without 400 and 800, which are companies' service numbers.
NORTH_AMERICA = (
    rf"{START}(?:\+?1[ .-])?(?!\(?[48]00)(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[.-]\d{{4}}{END}"
)
INTERNATIONAL = rf"(?<![\w+*/=^.-])(?<![\w)] )\+[1-9]\d{{0,2}}(?:[ .-]?\(?\d{{1,5}}\)?){{1,6}}{END}"
SIX_DIGITS = re.compile(r"\d(?:[ .()（）-]{0,2}\d){5}")  # fewer are never masked
PHONES = [re.compile(pattern) for pattern in (MOBILE, LANDLINE, NORTH_AMERICA, INTERNATIONAL)]

ID_NUMBER = re.compile(
    r"(?<![0-9A-Za-z_./=&%-])[1-9]\d{5}(?P<year>19\d\d|20\d\d)(?P<month>\d\d)(?P<day>\d\d)\d{3}[\dXx](?![0-9A-Za-z_])"
)
BANK_CARD = re.compile(
    r"(?<![0-9A-Za-z_.+/=&%-])[2-6]\d{3}(?:\d{11,15}|(?P<gap>["
    r" -])\d{4}(?:(?P=gap)\d{4}){2}(?:(?P=gap)\d{3})?)"
    r"(?![0-9A-Za-z_]|[.-]\d)"
)
CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|62|60|65|3[47]")
IP_ADDRESS = re.compile(r"(?<![\w.:/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
VERSION_WORD = re.compile(
    r"(?:\bv|\bver|version|release|section|chapter|版本|版|章|节|第)[ :：.]*$", re.IGNORECASE
)


def is_id_number(number: str) -> bool:
    """Whether an 18-character PRC resident number has a real date and its check digit (GB
    11643)."""
    if not 11 <= int(number[:2]) <= 82:
        return False
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    weights = (2 ** (17 - position) % 11 for position in range(17))
    total = sum(int(digit) * weight for digit, weight in zip(number[:17], weights, strict=True))
    return "10X98765432"[total % 11] == number[17].upper()


def is_card_number(number: str) -> bool:
    """Whether digits start as those of a large card network and pass the Luhn check (ISO/IEC
    7812-1)."""
    if not CARD_PREFIX.match(number) or not 15 <= len(number) <= 19 or len(set(number)) < 4:
        return False
    if len(number) == 15 and number[:2] not in ("34", "37"):
        return False
    doubled = [int(digit) * (1 + index % 2) for index, digit in enumerate(reversed(number))]
    return sum(digit // 10 + digit % 10 for digit in doubled) % 10 == 0


def _is_email(match: re.Match) -> bool:
    return not RESERVED_DOMAINS.search(match["domain"])


def _is_phone(match: re.Match) -> bool:
    digits = sum(character.isdigit() for character in match[0])
    # Written without a gap, more digits are a number: E.164 allows 15, but hardly a country uses
    # more than 13.
    return 9 <= digits <= (21 if digits < len(match[0].removeprefix("+")) else 13)


def _is_bank_card(match: re.Match) -> bool:
    return is_card_number(re.sub("[ -]", "", match[0]))


def _is_ip_address(match: re.Match) -> bool:
    octets = match[0].split(".")
    if any(octet != str(int(octet)) or int(octet) > 255 for octet in octets):
        return False
    # 1.2.3.4 and 4.10.2.1 are versions or section numbers far more often than addresses of people.
    start = match.start()
    is_version = VERSION_WORD.search(match.string, max(0, start - 12), start)
    if is_version or sum(int(octet) >= 10 for octet in octets) < 2:
        return False
    return ipaddress.ip_address(match[0]).is_global


@dataclass(frozen=True)
class MaskPersonalData(Transform):
    """E-mail, phone, identity, bank card numbers and public IPv4 addresses -> `[EMAIL]`, `[PHONE]`
    and so on."""

    name: ClassVar[str] = "mask_pii"
    machine: ClassVar[bool] = True
    kinds: list[str] = field(default_factory=lambda: list(PLACEHOLDERS))

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in PLACEHOLDERS:
                raise ValueError(
                    f"kinds: found {kind!r}{closest(kind, PLACEHOLDERS)}, expected"
                    f" {', '.join(PLACEHOLDERS)}"
                )

    def __call__(self, text: str) -> str:
        if "email" in self.kinds and "@" in text:
            text = _mask(EMAIL, _is_email, "email", text)
        if not SIX_DIGITS.search(text):
            return text
        # Longer numbers first, so that no phone number is seen inside of them.
        if "id_number" in self.kinds:
            text = _mask(ID_NUMBER, lambda match: is_id_number(match[0]), "id_number", text)
        if "bank_card" in self.kinds:
            text = _mask(BANK_CARD, _is_bank_card, "bank_card", text)
        if "phone" in self.kinds:
            for pattern in PHONES:
                text = _mask(pattern, _is_phone, "phone", text)
        if "ip_address" in self.kinds:
            text = _mask(IP_ADDRESS, _is_ip_address, "ip_address", text)
        return text


def _mask(
    pattern: re.Pattern, is_personal: Callable[[re.Match], bool], kind: str, text: str
) -> str:
    def replace(match: re.Match) -> str:
        if not is_personal(match):
            return match[0]
        before = text[max(match.start() - 3, 0) : match.start()]
        # A number that is a JSON value, as in a tool call within a reply, must become a string.
        is_value = before.rstrip().endswith('":')
        return f'"{PLACEHOLDERS[kind]}"' if is_value else PLACEHOLDERS[kind]

    return pattern.sub(replace, text)
