"""Exact int8 Winograd 3x3 convolutions, and layers of one bit, for x86 CPUs.

:class:`Winograd` packs the weights of one layer and runs it on 8-bit images; :func:`isas` says what this CPU has.
The arithmetic is specified bit for bit in the README; every instruction set gives the same bits.
:class:`BinaryLinear` and :class:`BinaryConv` multiply signs by signs; :class:`AdderLayer` has L1 distances in place of
products.
"""

from ._library import compiler, isas, peak
from .adder import AdderLayer, adder_isas
from .binary import BinaryConv, BinaryLinear, binary_isas, pack_signs
from .winograd import Winograd

__version__ = "0.1.0"

__all__ = [
    "AdderLayer",
    "BinaryConv",
    "BinaryLinear",
    "Winograd",
    "adder_isas",
    "binary_isas",
    "compiler",
    "isas",
    "pack_signs",
    "peak",
    "__version__",
]
