"""Draws docs/_static/pipeline.svg, the picture of the README: python docs/pipeline.py"""

from __future__ import annotations

from html import escape
from pathlib import Path

import bitsmith as bs

# verb, what goes in and out, how
STEPS: tuple[tuple[str, str, str], ...] = (
    ("sites", "model → sites", "run once, never traced"),
    ("profile", "sites → table", "loss and ms of each site"),
    ("search", "table + budget → plan", "plans measured whole"),
    ("apply", "plan → simulation", "an ordinary nn.Module"),
    ("export", "simulation → file", "ONNX or OpenVINO"),
    ("verify", "file against simulation", "every site, as it ran"),
    ("report", "asked against got", "one page, and JSON"),
)
MEASURED = frozenset({"profile", "search", "verify"})
"""Verbs that run the runtime."""

WIDTH, HEIGHT, GAP, TOP, LEFT = 148, 92, 22, 74, 12


def svg() -> str:
    """The picture. Fails if a step is not a verb of the package."""
    total = LEFT * 2 + len(STEPS) * WIDTH + (len(STEPS) - 1) * GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} 256" font-family="system-ui, sans-serif" '
        'role="img" aria-label="The verbs of Bitsmith, from a model to a report">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#64748b"/></marker></defs>',
        f'<rect width="{total}" height="256" rx="10" fill="#ffffff"/>',
        f'<rect x="{LEFT}" y="14" width="{total - 2 * LEFT}" height="32" rx="6" fill="#f1f5f9" stroke="#cbd5e1"/>',
        text(total / 2, 35, "optimize: all of it in one call", 15, "#0f172a", bold=True),
    ]
    for index, (verb, gives, how) in enumerate(STEPS):
        if verb not in bs.__all__:
            raise ValueError(f"bitsmith has no verb {verb!r}: mend STEPS in {__file__}")
        x = LEFT + index * (WIDTH + GAP)
        fill, edge = ("#ffedd5", "#ea580c") if verb in MEASURED else ("#e0f2fe", "#0284c7")
        parts.append(
            f'<rect x="{x}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}" stroke="{edge}"/>'
        )
        middle = x + WIDTH / 2
        parts.append(text(middle, TOP + 30, verb, 18, "#0f172a", bold=True))
        parts.append(text(middle, TOP + 54, gives, 12, "#0f172a"))
        parts.append(text(middle, TOP + 74, how, 11, "#475569"))
        if index:
            parts.append(line(x - GAP + 1, TOP + HEIGHT / 2, x - 2, TOP + HEIGHT / 2))
        if verb in MEASURED:
            parts.append(line(middle, 206, middle, TOP + HEIGHT + 3))
    parts += [
        f'<rect x="{LEFT}" y="206" width="{total - 2 * LEFT}" height="36" rx="8" fill="#fff7ed" stroke="#ea580c"/>',
        text(total / 2, 229, "the runtime: ONNX Runtime, OpenVINO, or a hardware model", 14, "#0f172a"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def text(x: float, y: float, words: str, size: int, colour: str, bold: bool = False) -> str:
    weight = "600" if bold else "400"
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="middle"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="#64748b" stroke-width="1.5" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    place = Path(__file__).parent / "_static" / "pipeline.svg"
    place.parent.mkdir(exist_ok=True)
    place.write_text(svg(), encoding="utf-8")
