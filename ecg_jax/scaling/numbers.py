"""Numbers as people read them: counts, losses, ratios, intervals. Plain text, no HTML.

Invariant: the same number always looks the same, whichever table or figure it stands in.
"""

import math
from collections.abc import Sequence

MINUS, DASH, TIMES = "\u2212", "\u2013", "\u00d7"
RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def count(x: float) -> str:
    """A number of records or parameters: 512, 8,192, 60.3 K, 2.3 M."""
    if x < 1e4:
        return f"{x:,.0f}"
    for unit, size in (("K", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if x < 999.5 * size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.3g}"


def short(x: float | None, digits: int = 3) -> str:
    """Significant digits, scientific only outside 1e-4 to 1e6; a dash for None."""
    if x is None or math.isnan(x):
        return DASH
    if x == 0 or 1e-4 <= abs(x) < 1e6:
        text = f"{x:.{digits}g}" if "e" not in f"{x:.{digits}g}" else f"{x:,.0f}"
        # Trailing zeros carry precision: 0.30, not 0.3.
        if x and abs(x) < 10 ** (digits - 1):
            text = f"{x:.{max(digits - 1 - math.floor(math.log10(abs(float(text)))), 0)}f}"
        return text.replace("-", MINUS)
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa} {TIMES} 10".replace("-", MINUS) + str(int(exponent)).translate(RAISED)


def interval(ends: Sequence[float | None], digits: int = 3) -> str:
    """`0.21 - 0.35`, with words where an end is unbounded."""
    low, high = ends
    if low is None and high is None:
        return "unbounded"
    if high is None:
        return f"at least {short(low, digits)}"
    if low is None:
        return f"at most {short(high, digits)}"
    return f"{short(low, digits)} to {short(high, digits)}"


def p(x: float | None) -> str:
    """A p value: 0.034, < 0.001, a dash for None."""
    if x is None:
        return DASH
    return "< 0.001" if x < 1e-3 else f"{x:.3f}" if x < 0.0995 else f"{x:.2f}"


def percent(x: float, digits: int = 2) -> str:
    return f"{short(100 * x, digits)} %"
