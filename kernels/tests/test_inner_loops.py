"""The speed of a kernel is that of its inner loop: gcc spills accumulators at slight changes."""

from __future__ import annotations

import platform
import shutil

import pytest

from bitsmith_kernels import _library
from hot_loop import functions, hot_loop

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the loops are for x86-64"),
]

# set, bytes or words, the instruction, its register, rows
LOOPS = [
    ("Avx512Vnni", True, "vpdpbusd", "zmm", 14),
    ("Avx512Vnni", False, "vpdpwssd", "zmm", 14),
    ("AvxVnni", True, "{vex} vpdpbusd", "ymm", 6),
    ("AvxVnni", False, "{vex} vpdpwssd", "ymm", 6),
    ("Avx2", False, "vpmaddwd", "ymm", 6),
]


@pytest.fixture(scope="module")
def code() -> dict[str, list[tuple[int, str]]]:
    return functions(_library.path())


@pytest.mark.parametrize(("name", "of_bytes", "product", "register", "most"), LOOPS)
def test_products_in_registers(
    code: dict[str, list[tuple[int, str]]], name: str, of_bytes: bool, product: str, register: str, most: int
) -> None:
    for rows in range(1, most + 1):
        for columns in (1, 2):
            form = f"micro<(anonymous namespace)::{name}, {str(of_bytes).lower()}, {rows}, {columns}>("
            check(code, form, product, register, rows * columns)


# taps of a column, tiles at once
COLUMNS = [(tile, rows) for tile, most in ((2, 3), (4, 2)) for rows in range(1, most + 1)]


@pytest.mark.parametrize(("tile", "rows"), COLUMNS)
@pytest.mark.parametrize(("of_bytes", "product"), [(True, "vpdpbusd"), (False, "vpdpwssd")])
def test_products_of_a_column_in_registers(
    code: dict[str, list[tuple[int, str]]], tile: int, rows: int, of_bytes: bool, product: str
) -> None:
    for columns in (1, 2):
        which = f"{str(of_bytes).lower()}, {tile}, {rows}, {columns}"
        form = f"micro_column<(anonymous namespace)::Avx512Vnni, {which}>("
        loop = check(code, form, product, "zmm", (tile + 2) * rows * columns)
        loads = [text for text in loop if "(" in text and "zmm" in text]
        assert len(loads) == (tile + 2) * (rows + columns), f"{form}: weights are loaded more than once"


@pytest.mark.parametrize(
    ("form", "count"), [("area<4, 4>", 16), ("area<4, 3>", 12), ("area<8, 1>", 8), ("tile<4, 4>", 16)]
)
def test_counts_of_signs_in_registers(code: dict[str, list[tuple[int, str]]], form: str, count: int) -> None:
    check(code, f"{form}(bitsmith::Binary", "vpopcntq", "zmm", count)


def check(code: dict[str, list[tuple[int, str]]], form: str, product: str, register: str, count: int) -> list[str]:
    """The innermost loop of the function, which has so many products, in registers."""
    bodies = [body for symbol, body in code.items() if form in symbol]
    if not bodies:
        pytest.skip(f"this build has no {form}")
    (body,) = bodies
    loop = hot_loop(body, product)
    products = [text for text in loop if text.startswith(product)]
    assert len(products) == count, form
    assert all(f"%{register}" in text for text in products)
    framed = any("%rsp,%rbp" in text for _, text in body)  # else rbp is a register like any other
    spills = [t for t in loop if "(%rsp" in t or (framed and "(%rbp" in t)]
    assert not spills, f"{form}: {spills}"
    copies = [t for t in loop if t.startswith("vmov") and "(" not in t]
    assert not copies, f"{form}: {copies}"
    return loop
