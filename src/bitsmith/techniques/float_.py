"""Float: the site is computed as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..site import Format, Record, Site
from ..technique import Cell, No, Technique


@dataclass(frozen=True)
class Float(Technique):
    """Floating point, as the model computes it (IEEE 754).

    ``dtype="bfloat16"`` rounds operands and result to bfloat16, for targets that have it. ``out``: integer format in
    which the output is stored behind its epilogue: a sum in float that all its readers see rounded, put in by
    ``target.adapt`` where a runtime adds inside the convolution before.

    >>> Float()
    Float()
    >>> Float("bfloat16")
    Float(dtype='bfloat16')
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    out: Format | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"Float(dtype={self.dtype!r}): must be 'float32' or 'bfloat16'")

    def __repr__(self) -> str:
        parts = [f"dtype={self.dtype!r}"] if self.dtype != "float32" else []
        parts += [f"out={self.out!r}"] if self.out is not None else []
        return f"Float({', '.join(parts)})"

    def fits(self, site: Site) -> bool | No:
        if self.dtype != "float32" and site.kind == "module":
            return No("a whole module runs in the precision of its parameters")
        return True

    def writes(self, site: Site) -> Format | None:
        return self.out

    def bits(self, site: Site) -> float:
        return site.parameter_bytes * (8.0 if self.dtype == "float32" else 4.0)

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _FloatCell(site, self.dtype)


class _FloatCell(Cell):
    fresh = True

    def __init__(self, site: Site, dtype: str) -> None:
        super().__init__(site)
        self.dtype = torch.bfloat16 if dtype == "bfloat16" else None

    def forward(self, *operands: Any, **rest: Any) -> Any:
        if self.kind == "module":
            inner = rest.pop("inner")
            return inner(*operands, **rest)
        if self.dtype is None:
            return self.op(*operands, **rest)
        rounded = [_round(x, self.dtype) for x in operands]
        output = self.op(*rounded, **rest)
        return _round(output, self.dtype) if isinstance(output, Tensor) else output


def _round(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.to(dtype).to(x.dtype)
    return x
