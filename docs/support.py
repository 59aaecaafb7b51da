"""Writes the table of techniques and runtimes into README.md, from what the targets say: python docs/support.py"""

from __future__ import annotations

import re
from pathlib import Path

from bitsmith.cli.look import example_sites, support
from bitsmith.targets import OnnxRuntime, OpenVino, Target
from bitsmith.technique import Technique
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support: written by docs/support.py -->\n", "<!-- /support -->\n"

RUNTIMES: tuple[tuple[str, Target], ...] = (("ONNX Runtime", OnnxRuntime()), ("OpenVINO", OpenVino()))
TECHNIQUES: tuple[Technique, ...] = (
    Float(),
    Int(8, 8),
    Int(8, None),
    Int(4, 8),
    Int(4, None, granularity="group", group=32),
)


def table() -> str:
    """Markdown: technique by runtime; the operations that have a kernel, or why no operation with weights has."""
    weighted = {name for name, site in example_sites().items() if site.weight is not None}
    lines = ["| technique | " + " | ".join(name for name, _ in RUNTIMES) + " |", "|---" * (len(RUNTIMES) + 1) + "|"]
    for technique in TECHNIQUES:
        cells = []
        for _, target in RUNTIMES:
            reasons = {kind: row[technique] for kind, row in support(target, [technique]).items()}
            able = [kind for kind, reason in reasons.items() if not reason]
            if len(able) == len(reasons):
                cells.append("every operation")
            elif weighted.isdisjoint(able):
                cells.append(f"not offered; {reasons['linear']}")
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


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
