"""Network coordinates: round trips to peers never contacted.

Vivaldi with height (Dabek, Cox, Kaashoek, Morris, "Vivaldi", SIGCOMM 2004): a peer is a point in three
dimensions plus a height, the delay of its access link; the distance of two points plus both heights estimates
the round trip. Packed, a coordinate is one integer of 63 bits: three 16-bit components and a 15-bit height, in
units of 2**14 ns (16 us), so that it reaches 0.54 s each way. 0 says "unknown".

Only `+ - * /` and `sqrt` are used, which IEEE 754 rounds the same everywhere, so that simulations repeat.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS, SECOND_NS

UNKNOWN: Final = 0
COORDINATE_BITS: Final = 63
UNIT_BITS: Final = 14
UNIT_NS: Final = float(1 << UNIT_BITS)
_ZERO: Final = 1 << 15
_MAX_HEIGHT: Final = (1 << 15) - 1

#: Components below this need not be moved to the border.
_INSIDE_NS: Final = float(_ZERO - 2) * UNIT_NS

#: The error travels as parts of 1000; a node that knows nothing says 1000.
ERROR_SCALE: Final = 1000

#: Vivaldi's constants c_e and c_c, as in the paper; but an unsure node moves faster, up to the whole way:
#: measured, a network is then placed in 40 samples a node instead of 150.
_TUNE_ERROR: Final = 0.25
_TUNE_MOVE: Final = 0.25
_TUNE_UNSURE: Final = 1.5

#: An access link below 0.1 ms is not told from none; a height of zero could never grow.
_MIN_HEIGHT_NS: Final = 100_000.0

#: Nobody is believed to be more exact than this: else one peer that claims an error of 0 would move us fully.
_MIN_REMOTE_ERROR: Final = 0.05

#: One sample moves an unsure node at most this far, a sure one a tenth of it and more in proportion to its
#: error: a liar needs many answers, honest ones pull back meanwhile.
_MAX_FORCE_NS: Final = 100.0 * MILLISECOND_NS
_MIN_FORCE_SHARE: Final = 0.1

#: Longer is not a round trip but a stopped process; shorter than 1 us is a clock's fault.
_MAX_RTT_NS: Final = 3 * SECOND_NS
_MIN_RTT_NS: Final = 1_000

#: Once we are settled (error below _SETTLED), a sample this many times off its estimate in either direction is
#: not followed. It makes us a little less sure instead, so that a node that really moved follows after some 20
#: of them.
_SETTLED: Final = 0.4
_ABSURD: Final = 5.0
_DOUBT: Final = 1.0 / 64.0


def pack(x_ns: float, y_ns: float, z_ns: float, height_ns: float) -> int:
    """Rounded to units; what lies outside is moved to the border."""
    packed = 0
    for value in (x_ns, y_ns, z_ns):
        unit = round(value / UNIT_NS)
        packed = packed << 16 | (min(max(unit, 1 - _ZERO), _ZERO - 1) + _ZERO)
    height = min(max(round(height_ns / UNIT_NS), 0), _MAX_HEIGHT)
    return packed << 15 | height


def unpack(packed: int) -> tuple[float, float, float, float]:
    """x, y, z, height in nanoseconds."""
    return (
        ((packed >> 47) - _ZERO) * UNIT_NS,
        ((packed >> 31 & 0xFFFF) - _ZERO) * UNIT_NS,
        ((packed >> 15 & 0xFFFF) - _ZERO) * UNIT_NS,
        (packed & 0x7FFF) * UNIT_NS,
    )


def estimate_ns(a: int, b: int) -> int:
    """Round trip between two packed coordinates; meaningless if either is UNKNOWN."""
    dx = (a >> 47) - (b >> 47)
    dy = (a >> 31 & 0xFFFF) - (b >> 31 & 0xFFFF)
    dz = (a >> 15 & 0xFFFF) - (b >> 15 & 0xFFFF)
    units = sqrt(dx * dx + dy * dy + dz * dz) + (a & 0x7FFF) + (b & 0x7FFF)
    return int(units * UNIT_NS)


class Vivaldi:
    """A node's own coordinate, for reading: `packed`; `error`, the expected relative error of an estimate, 0
    (exact) to 1 (unknown); `error_parts`, the same as it travels.
    """

    __slots__ = ("_height", "_x", "_y", "_z", "error", "error_parts", "packed")

    def __init__(self) -> None:
        self._x: float = 0.0
        self._y: float = 0.0
        self._z: float = 0.0
        self._height = _MIN_HEIGHT_NS
        self.error = 1.0
        self.error_parts = ERROR_SCALE
        self.packed = pack(0.0, 0.0, 0.0, _MIN_HEIGHT_NS)

    def place(self, packed: int, error: float) -> None:
        """Start from a remembered or a given coordinate."""
        self._x, self._y, self._z, self._height = unpack(packed)
        self._height = max(self._height, _MIN_HEIGHT_NS)
        self.error = min(max(error, 0.01), 1.0)
        self.error_parts = round(self.error * ERROR_SCALE)
        self.packed = packed

    def sample(self, remote: int, remote_error_parts: int, rtt_ns: int, dice: Dice) -> bool:
        """One measured round trip to a peer that says it stands at `remote`. False: the sample was not
        followed.
        """
        if remote == UNKNOWN or not _MIN_RTT_NS <= rtt_ns <= _MAX_RTT_NS:
            return False
        error = self.error
        if remote_error_parts >= ERROR_SCALE and error < 1.0:
            return False  # a newcomer's place says nothing yet; but two newcomers must start somewhere
        # `unpack` and `pack` written out: every answer comes through here.
        dx = self._x - ((remote >> 47) - _ZERO) * UNIT_NS
        dy = self._y - ((remote >> 31 & 0xFFFF) - _ZERO) * UNIT_NS
        dz = self._z - ((remote >> 15 & 0xFFFF) - _ZERO) * UNIT_NS
        flat = sqrt(dx * dx + dy * dy + dz * dz)
        heights = self._height + (remote & 0x7FFF) * UNIT_NS
        estimate = flat + heights
        rtt = float(rtt_ns)
        relative = abs(estimate - rtt) / rtt
        if error < _SETTLED and (estimate > _ABSURD * rtt or rtt > _ABSURD * estimate):
            self.error = min(1.0, error + _DOUBT)
            self.error_parts = round(self.error * ERROR_SCALE)
            return False
        remote_error = max(remote_error_parts / ERROR_SCALE, _MIN_REMOTE_ERROR)
        weight = error / (error + remote_error)
        tune = _TUNE_ERROR * weight
        self.error = error = min(max(min(relative, 1.0) * tune + error * (1.0 - tune), 0.01), 1.0)
        self.error_parts = round(error * ERROR_SCALE)
        limit = _MAX_FORCE_NS * min(1.0, _MIN_FORCE_SHARE + 2.0 * error)
        move = min(1.0, _TUNE_MOVE + _TUNE_UNSURE * error) * weight
        force = min(max(rtt - estimate, -limit), limit) * move
        if flat < UNIT_NS:
            # Two at one place must part in some direction; the dice give each node its own.
            dx, dy, dz = (dice.unit() - 0.5 for _ in range(3))
            flat = sqrt(dx * dx + dy * dy + dz * dz) or 1.0
            flat_share = force / flat
        else:
            flat_share = force / estimate
        self._x = x = self._x + dx * flat_share
        self._y = y = self._y + dy * flat_share
        self._z = z = self._z + dz * flat_share
        height = self._height
        if estimate > 0.0:
            self._height = height = max(height + heights * force / estimate, _MIN_HEIGHT_NS)
        if -_INSIDE_NS < x < _INSIDE_NS > y > -_INSIDE_NS < z < _INSIDE_NS > height:
            self.packed = (
                (round(x / UNIT_NS) + _ZERO) << 47
                | (round(y / UNIT_NS) + _ZERO) << 31
                | (round(z / UNIT_NS) + _ZERO) << 15
                | round(height / UNIT_NS)
            )
        else:
            self.packed = pack(x, y, z, height)
        return True
