"""What a device costs for an hour."""

import re
from dataclasses import dataclass

from minimind.common.errors import UserError

SIGNS = "$€¥£￥"
PRICE = re.compile(
    rf"(?P<sign>[{SIGNS}]?) ?(?P<amount>\d+(\.\d+)?) ?(?P<unit>[A-Za-z]{{3}}|元)?"
    r"( ?/ ?(h|hr|hour|小时|时))?"
)


@dataclass(frozen=True)
class Price:
    """The cost of one device for one hour, in some currency."""

    amount: float
    currency: str = ""

    def shown(self, hours: float) -> str:
        """The cost of some device hours."""
        number = f"{self.amount * hours:,.2f}"
        return self.currency + number if self.currency in SIGNS else f"{number} {self.currency}"


def parse_price(text: str) -> Price:
    """`8/h`, `8`, `$1.5/h`, `8 CNY/h`, `2元/小时` -> a price; raises UserError."""
    match = PRICE.fullmatch(text.strip())
    if match is None or (match["sign"] and match["unit"]):
        raise UserError(
            f"--price {text}: expected an amount per device and hour, such as 8/h, $1.50/h,"
            " 8 CNY/h or 8元/h."
        )
    currency = match["sign"].replace("￥", "¥") or (match["unit"] or "").upper()
    return Price(float(match["amount"]), currency)
