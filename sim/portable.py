"""ln, exp, sine, cosine and arcsine that give the same bits on every machine.

IEEE 754 rounds +, -, *, / and the square root correctly, so they agree everywhere; the functions of the C
library do not (glibc, musl, macOS and Windows differ in the last bit of `log` or `cos`). One bit decides
which of two messages comes first, and from there on two runs are two different histories. So whatever leads
to an event's time or order is computed by the five operations only. Series are summed to about 1e-15, which
is plenty for distances and waiting times; nobody should take these for a library of mathematics.
"""

from __future__ import annotations

import math
from typing import Final

PI: Final = 3.141592653589793
_LN_2: Final = 0.6931471805599453
_SQRT_HALF: Final = 0.7071067811865476

#: Beyond it `exp` would leave the range of a double.
_MAX_EXPONENT: Final = 700.0


def ln(x: float) -> float:
    """Natural logarithm. Raises ValueError unless 0 < x < inf.

    x = m * 2**e with m near 1 (frexp is exact), ln m = 2 artanh((m-1)/(m+1)) as a series.
    """
    if not 0.0 < x < math.inf:
        raise ValueError(f"ln wants a positive finite number, not {x!r}")
    mantissa, exponent = math.frexp(x)
    if mantissa < _SQRT_HALF:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square = z * z  # at most 0.0295, so that 12 terms reach 1e-19
    total = 0.0
    for odd in range(23, 0, -2):
        total = total * square + 1.0 / odd
    return exponent * _LN_2 + 2.0 * z * total


def exp(x: float) -> float:
    """E to the x. Raises ValueError beyond +-700."""
    if not -_MAX_EXPONENT <= x <= _MAX_EXPONENT:
        raise ValueError(f"exp wants a number between -700 and 700, not {x!r}")
    halvings = math.floor(x / _LN_2 + 0.5)
    rest = x - halvings * _LN_2  # at most 0.347
    total = 1.0
    for n in range(17, 0, -1):
        total = 1.0 + rest * total / n
    return math.ldexp(total, halvings)  # a power of two: exact


def power(base: float, exponent: float) -> float:
    """`base ** exponent` for base >= 0."""
    return 0.0 if base == 0.0 else exp(exponent * ln(base))


def sin(x: float) -> float:
    """Sine of x radians; meant for |x| up to some thousands."""
    turns = math.floor(x / (2.0 * PI) + 0.5)
    x -= turns * 2.0 * PI
    if x > PI / 2.0:
        x = PI - x
    elif x < -PI / 2.0:
        x = -PI - x
    square = x * x
    total = 1.0
    for n in range(22, 1, -2):  # Taylor, Horner's way
        total = 1.0 - square * total / (n * (n + 1))
    return x * total


def cos(x: float) -> float:
    """Cosine of x radians."""
    return sin(x + PI / 2.0)


def arcsin(x: float) -> float:
    """Arc sine in radians, -1 <= x <= 1 (values just outside, from rounding, are taken as +-1)."""
    x = max(-1.0, min(1.0, x))
    if x < 0.0:
        return -arcsin(-x)
    if x > 0.5:  # halve the angle
        return PI / 2.0 - 2.0 * arcsin(math.sqrt((1.0 - x) / 2.0))
    square = x * x  # at most 0.25: 25 terms reach 1e-17
    total, term = 0.0, x
    for n in range(25):
        total += term / (2 * n + 1)
        term *= square * (2 * n + 1) / (2 * n + 2)
    return total
