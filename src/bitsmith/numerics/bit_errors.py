"""How often a weight that is stored in resistances is read as the other bit."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ResistiveBit:
    """One bit in two states of resistance, each lognormal: hafnium-oxide devices, read as one (1T1R) or as a pair that
    is programmed to opposite states and compared (2T2R) (Hirtzlin et al. 2020, doi:10.3389/fnins.2019.01383).

    ``on``, ``off``: median resistances, in kOhm. ``on_spread``, ``off_spread``: standard deviations of their natural
    logarithms.

    >>> cell = ResistiveBit(on=5.0, off=50.0, on_spread=0.3, off_spread=0.9)
    >>> print(f"{cell.pair_error_rate():.1e} {cell.single_error_rate():.1e}")
    7.6e-03 2.8e-02
    """

    on: float
    off: float
    on_spread: float
    off_spread: float

    def __post_init__(self) -> None:
        if not 0.0 < self.on < self.off < math.inf:
            raise ValueError(f"ResistiveBit(on={self.on}, off={self.off}): medians must be 0 < on < off, in kOhm")
        for name, value in (("on_spread", self.on_spread), ("off_spread", self.off_spread)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"ResistiveBit({name}={value}): a standard deviation must be 0 or more")

    def pair_error_rate(self) -> float:
        """P(R_on > R_off) for two independent devices: ``Phi(-ln(off / on) / sqrt(on_spread^2 + off_spread^2))``."""
        return _above(math.log(self.off / self.on), math.hypot(self.on_spread, self.off_spread))

    def single_error_rate(self, reference: float | None = None) -> float:
        """Of one device against a ``reference`` in kOhm, both states equally often.

        None: where both medians are equally many standard deviations away, the geometric mean with equal spreads.
        """
        if reference is None:
            both = self.on_spread + self.off_spread
            part = self.on_spread / both if both else 0.5
            reference = self.on * (self.off / self.on) ** part
        if not 0.0 < reference < math.inf:
            raise ValueError(f"single_error_rate(reference={reference}): a resistance must be above 0 kOhm")
        on = _above(math.log(reference / self.on), self.on_spread)
        return (on + _above(math.log(self.off / reference), self.off_spread)) / 2


def _above(distance: float, deviation: float) -> float:
    """P(x > distance) for a centred normal x."""
    if deviation == 0.0:
        return float(distance < 0.0)
    return 0.5 * math.erfc(distance / (deviation * math.sqrt(2.0)))
