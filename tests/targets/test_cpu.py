"""What the CPU runtimes share: the range that kernels without VNNI can sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitsmith.deploy import export
from bitsmith.model.apply import apply
from bitsmith.model.network import network
from bitsmith.plan import Plan
from bitsmith.targets import _cpu
from bitsmith.targets.base import example_arrays
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.targets.openvino import OpenVino
from bitsmith.technique import No
from bitsmith.techniques.int_ import Int


def test_the_processor_says_whether_its_sums_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, machine, expected in (
        ("fpu avx2", "x86_64", True),
        ("fpu avx2 avx512_vnni", "x86_64", False),
        ("fpu avx2 avx_vnni", "AMD64", False),
        ("fpu avx2", "aarch64", False),
    ):
        monkeypatch.setattr(_cpu.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(
            Path, "read_text", lambda self, flags=flags, **_: f"processor : 0\nflags\t\t: {flags}\nbugs :\n"
        )
        _cpu.saturates.cache_clear()
        assert _cpu.saturates() is expected
    monkeypatch.undo()
    _cpu.saturates.cache_clear()


@pytest.mark.parametrize("target", [OnnxRuntime, OpenVino])
def test_the_reduced_range_keeps_weights_within_7_bits_and_runs_in_int8(target: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    data = [(torch.randn(4, 3, 8, 8), None)]
    record = network(net, data[0][0]).record
    plan = Plan({"0": Int(8, 8), "3": Int(8, 8)})
    narrow, full = target(threads=1, reduced_range=True), target(threads=1, reduced_range=False)
    assert {t.w for t in narrow.adapt(plan, record).sites.values()} == {7}
    assert {t.w for t in full.adapt(plan, record).sites.values()} == {8}
    assert not isinstance(narrow.supports(Int(7, 8), record.sites["0"]), No)
    applied = apply(net, narrow.adapt(plan, record), data)
    artifact = export(applied, narrow, tmp_path / ("net.xml" if target is OpenVino else "net.onnx"), data[0][0][:1])
    assert {narrow.inspect(artifact)[name].precision for name in plan.sites} == {"int8"}
    weight = next(value for name, value in applied.state_dict().items() if name.endswith("3.weight_scale"))
    integers = net[3].weight.detach() / weight[:, None]
    assert 62.5 <= float(integers.abs().max()) <= 63.5
    x = data[0][0][:1]
    (run,) = narrow.run(artifact, example_arrays(x))
    np.testing.assert_allclose(run, applied(x).detach().numpy(), atol=1e-5)
