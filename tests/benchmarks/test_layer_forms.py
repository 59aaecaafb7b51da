"""The benchmark of generated weights and adders: what it times and judges, on a small batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from repository import load

harness, layer_forms = load("benchmarks.harness"), load("benchmarks.layer_forms")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    threads = torch.get_num_threads()
    monkeypatch.setattr(layer_forms, "BATCH", 2)
    monkeypatch.setattr(layer_forms, "WIDTHS", ((4, 6),))
    monkeypatch.setattr(layer_forms, "interleaved", lambda calls, **_: harness.interleaved(calls, rounds=2, warm=0))
    made = harness.Benchmark("layer_forms", layer_forms.PARTS, default_threads=1)
    made.start([])
    torch.set_num_threads(threads)
    return made


@pytest.mark.parametrize("part", ["net", "layer"])
def test_every_form_is_timed_against_the_plain_one(bench: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_forms, "kinds", lambda bench: layer_forms.TECHNIQUES)
    getattr(layer_forms, part)(bench)
    assert [row["name"] for row in bench.rows] == [layer_forms.PLAIN, *layer_forms.TECHNIQUES]
    assert all(row["ms"] > 0 for row in bench.rows)
    assert len(bench.verdicts) == len(layer_forms.JUDGED)
    assert {verdict.bar for verdict in bench.verdicts} == {3.0, 6.0}


def test_without_kernels_the_adder_is_missed_not_judged(bench: Any) -> None:
    with layer_forms.without_kernels():
        kinds = layer_forms.kinds(bench)
    assert layer_forms.SLOW in kinds
    assert "Adder" not in kinds
    assert len(bench.misses) == 1
