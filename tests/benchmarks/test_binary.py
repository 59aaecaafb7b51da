"""The benchmark of layers of signs: one small run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from repository import load

binary, harness = load("benchmarks.binary"), load("benchmarks.harness")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("openvino")
    if binary._openvino_kernels.missing_signs() is not None:
        pytest.skip("no native kernels for signs")
    threads = torch.get_num_threads()
    monkeypatch.setattr(binary, "CONVOLUTIONS", ((32, 8),))
    monkeypatch.setattr(binary, "LINEAR", ((64, 3),))
    monkeypatch.setattr(binary, "DEPTH", 3)
    monkeypatch.setattr(binary, "ROUNDS", 3)
    made = harness.Benchmark("binary", binary.PARTS, default_threads=1)
    made.start([])
    torch.set_num_threads(threads)
    return made


def test_every_form_runs_as_it_was_asked_for(bench: Any) -> None:
    binary.layers(bench)
    assert [row["ran"] for row in bench.rows[:3]] == ["float32", "int8", "binary"]
    assert bench.rows[5]["ran"] == "binary"  # small integer layers the plugin may put into one node
    assert all(row["ms"] > 0 and row["cpu"] > 0 for row in bench.rows)
    assert [row["cpu gain"] for row in bench.rows if row["form"] == "int8"] == [1.0, 1.0]
    assert [verdict.what for verdict in bench.verdicts] == ["3x3 32@8", "linear 64, 3 rows"]
    assert not bench.misses
