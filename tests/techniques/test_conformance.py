"""Every technique in the package passes the suite that strangers' techniques are held to."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import bitsmith.techniques
from bitsmith.site import Format, Range
from bitsmith.technique import Technique
from bitsmith.techniques.adder import Adder
from bitsmith.techniques.binary import Binary
from bitsmith.techniques.degree_quant import DegreeQuant
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int
from bitsmith.techniques.ovsf import Ovsf
from bitsmith.techniques.palette import Palette
from bitsmith.techniques.sparse import Sparse
from bitsmith.techniques.sparse_paths import SparsePaths
from bitsmith.techniques.winograd import Winograd
from bitsmith.testing import check_technique

CHOSEN: tuple[Technique, ...] = (
    Float("bfloat16"),
    Int(8, 8, symmetric=True, signed=True, out=Format(8, signed=True, symmetric=True)),
    Int(4, None, granularity="group", group=2),
    Int(2, 4, range=Range("mse"), weight_range=Range("mse"), granularity="tensor"),
    Int(8, 16, affine_weights=True),
    Sparse(0.2),
    Sparse(0.3, "kernel"),
    Sparse(0.5, "n:m", m=2),
    Sparse(0.25, "block", block=(2, 1), schedule="polynomial"),
    Palette(2, group=2, learn="soft"),
    Palette(3, "uniform", of=Sparse(0.4)),
    Int(8, 8, of=Palette(3, of=Sparse(0.5))),
    Int(4, 4, granularity="tensor", of=Sparse(0.5)),
    SparsePaths(6, (4, 1), seed=3, signs="fixed"),
    SparsePaths(9, generator="random"),
    Binary("none", activations=True, cancel_gradient=0.5),
    Binary("learned", stochastic=True, error_rate=0.1),
    Adder("sign", None, 8, "separate"),
    Adder(precision=5),
    Ovsf(0.3, "kernel", coefficient_bits=1, compute="basis"),
    Ovsf(0.6, codes="first", coefficient_bits=4),
    DegreeQuant(4, 4, high=0.0, percentile=None, momentum=None, gradient="ste"),
    *(Winograd(tile, bits, kind) for tile in (2, 4, 6) for bits in (8, 16, 32) for kind in ("static", "flex")),
)


def in_package() -> Iterator[type[Technique]]:
    """Every technique class of ``bitsmith.techniques``."""
    for module in pkgutil.iter_modules(bitsmith.techniques.__path__):
        found = vars(importlib.import_module(f"bitsmith.techniques.{module.name}"))
        for value in found.values():
            if not isinstance(value, type) or not issubclass(value, Technique) or inspect.isabstract(value):
                continue
            if value.__module__.endswith(module.name):
                yield value


def default(kind: type[Technique]) -> Technique | None:
    required = [
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return None if required else kind()


@pytest.mark.parametrize("kind", list(in_package()), ids=lambda kind: kind.__name__)
def test_default_and_its_neighbours(kind: type[Technique]) -> None:
    technique = default(kind)
    if isinstance(technique, DegreeQuant):  # its default protects the nodes of a graph, which these models have not
        technique = DegreeQuant(high=0.0)
    if technique is None:
        assert any(isinstance(chosen, kind) for chosen in CHOSEN), f"{kind.__name__} has no defaults: put one in CHOSEN"
        return
    report = check_technique(technique, settings=8)
    assert report.kinds
    assert report.settings > 1 or not dataclasses.fields(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("technique", CHOSEN, ids=repr)
def test_chosen_settings(technique: Technique) -> None:
    assert check_technique(technique, kinds=["conv2d", "linear", "matmul", "add"], settings=0).settings == 1
