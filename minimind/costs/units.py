"""Numbers for a reader: counts, bytes, hours."""

GIB = 2**30


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:,.2f} M"


def amount(value: float) -> str:
    """A large number with its unit: k, M, G (10^9) or T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:,.3g} {unit}"
    return f"{value:,.3g}"


def gib(value: float) -> str:
    """Bytes in GiB, small ones in MiB."""
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"


def duration(hours: float) -> str:
    """Hours, minutes or seconds, whichever is shortest."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 2 else f"{max(hours * 3600, 1):.0f} s"
