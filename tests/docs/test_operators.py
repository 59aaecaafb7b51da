"""The page of ONNX operators is what the table says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_of_operators_is_written_from_the_table() -> None:
    spec = importlib.util.spec_from_file_location("support_of_operators", ROOT / "docs" / "support.py")
    assert spec is not None
    assert spec.loader is not None
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    page = (ROOT / "docs" / "onnx_operators.md").read_text(encoding="utf-8")
    assert support.operators() == page, "write it again: python docs/support.py"
    assert "| Convolution | `Conv`, `ConvTranspose` | |" in page
