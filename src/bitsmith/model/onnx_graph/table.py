"""The table: every ONNX operator that is read, by family, and what computes it."""

from __future__ import annotations

from collections.abc import Mapping

from . import convolution, elementwise, indexing, linear, normalisation, pooling, recurrent, reduction, resize, shape
from .graph import Operator

FAMILIES: Mapping[str, Mapping[str, Operator]] = {
    "Elementwise": elementwise.OPERATORS,
    "Matrix products": linear.OPERATORS,
    "Convolution": convolution.OPERATORS,
    "Pooling": pooling.OPERATORS,
    "Normalisation": normalisation.OPERATORS,
    "Recurrent": recurrent.OPERATORS,
    "Reduction": reduction.OPERATORS,
    "Shape": shape.OPERATORS,
    "Indices": indexing.OPERATORS,
    "Sampling": resize.OPERATORS,
}
"""Operators of the standard domain, by family."""

OPERATORS: Mapping[str, Operator] = {
    **{name: operator for family in FAMILIES.values() for name, operator in family.items()},
    **linear.FUSED,
    **elementwise.FUSED,
}
"""What a node can be computed by; ``bitsmith.*`` are made by ``fuse`` from several nodes."""

OPSETS = range(13, 23)
"""Versions of the standard operators that are read."""

FOLDED = frozenset({"Constant"})
"""Operators that never become a node of the network."""
