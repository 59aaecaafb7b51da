"""Writes what is supported, from the code: python docs/support.py

The table of techniques and runtimes into README.md, the table of ONNX operators into docs/onnx_operators.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from bitsmith.cli.look import example_sites, support
from bitsmith.model.onnx_graph.table import FAMILIES, OPSETS
from bitsmith.targets import CoreMl, OnnxRuntime, OpenVino, Target
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

README = Path(__file__).parents[1] / "README.md"
OPERATORS = Path(__file__).parent / "onnx_operators.md"
BEGIN, END = "<!-- support: written by docs/support.py -->\n", "<!-- /support -->\n"

RUNTIMES: tuple[tuple[str, Target], ...] = (
    ("ONNX Runtime", OnnxRuntime()),
    ("OpenVINO", OpenVino()),
    ("Core ML (files)", CoreMl()),
)
TECHNIQUES: tuple[Technique, ...] = (
    Float(),
    Int(8, 8),
    Int(8, None),
    Int(4, 8),
    Int(4, None, granularity="group", group=32),
    Winograd(),
    Binary(),
    SparsePaths(1024),
    Sparse(0.25),
    Palette(4),
    Ovsf(0.25),
    Adder(),
    DegreeQuant(),
)


def table() -> str:
    """Markdown: technique by runtime; the operations that have a kernel, or why no operation with weights has."""
    weighted = {name: site for name, site in example_sites().items() if site.weight is not None}
    lines = ["| technique | " + " | ".join(name for name, _ in RUNTIMES) + " |", "|---" * (len(RUNTIMES) + 1) + "|"]
    for technique in TECHNIQUES:
        cells = []
        for _, target in RUNTIMES:
            reasons = {kind: row[technique] for kind, row in support(target, [technique]).items()}
            able = [kind for kind, reason in reasons.items() if not reason]
            if len(able) == len(reasons):
                cells.append("every operation")
            elif not weighted.keys() & set(able):
                # why not where the technique itself can; "linear" speaks for all that it can compute
                fitting = [name for name, site in weighted.items() if technique.fits(site)]
                cells.append(f"not offered; {reasons['linear' if 'linear' in fitting else fitting[0]]}")
            else:
                cells.append(", ".join(f"`{name}`" for name in merged(able)))
        lines.append(f"| `{technique}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def merged(names: list[str]) -> list[str]:
    """``conv1d``, ``conv2d``, ``conv3d`` as one name.

    >>> merged(["conv1d", "conv2d", "conv3d", "linear"])
    ['conv1d/2d/3d', 'linear']
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if ", " in name:
            continue  # a variant of an operation that stands in the list
        match = re.fullmatch(r"(\w+?)(\dd)", name)
        found.setdefault(match[1] if match else name, []).extend([match[2]] if match else [])
    return [name + "/".join(sizes) for name, sizes in found.items()]


def replaced(readme: str) -> str:
    """The README with a fresh table between its marks."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def operators() -> str:
    """The page of ONNX operators: by family, with what of each is not read."""
    count = sum(len(family) for family in FAMILIES.values())
    lines = [
        "# ONNX operators",
        "",
        f'`bs.load("net.onnx")` reads {count} operators of the standard domain, opset {OPSETS.start} to '
        f"{OPSETS.stop - 1}, in float32. Constants are folded; local functions are inlined; the parts of layer "
        "normalisation, GELU, SiLU, hard swish and linear layers become the one operation that they were.",
        "",
        "| family | operator | not read |",
        "|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        plain = sorted(op for op, entry in family.items() if not entry.note)
        if plain:
            lines.append(f"| {name} | {', '.join(f'`{op}`' for op in plain)} | |")
        lines += [f"| {name} | `{op}` | {family[op].note} |" for op in sorted(family) if family[op].note]
    lines += [
        "",
        "`Constant` is folded. Control flow (`If`, `Loop`, `Scan`), sequences, random numbers, custom domains, files "
        "that are quantized already (`bs.load` runs them as they are) and float16 files are refused by name. This page "
        "is written by `python docs/support.py`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OPERATORS.write_text(operators(), encoding="utf-8")
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
