"""``bitsmith sites`` and ``bitsmith targets``."""

from __future__ import annotations

import json
from pathlib import Path

from bitsmith.cli.look import example_sites, support
from bitsmith.operations import OPERATIONS
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int

from .conftest import Run

ARGV = ("sites", "net.py:build", "--data", "data.py:task")


def test_the_sites_are_a_table_with_their_multiplications(files: Path, run: Run) -> None:
    said = run(*ARGV)
    assert said.code == 0, said.err
    first = next(line for line in said.out.splitlines() if line.split()[:1] == ["0"])
    macs = 16 * 16 * 12 * 12 * 3 * 9  # batch x channels x pixels x inputs x taps
    assert first.split() == ["0", "conv2d", "integer", "16x16x12x12", "1", f"{macs / 1e6:.3f}", "1.7", "1"]
    assert "for a batch of 16" in said.out


def test_the_sites_as_json_are_all_that_is_known(files: Path, run: Run) -> None:
    found = json.loads(run(*ARGV, "--json").out)
    assert [site["kind"] for site in found] == ["conv2d", "relu", "conv2d", "relu", "adaptive_avg_pool2d", "linear"]
    assert found[0]["operands"][1]["shape"] == [16, 3, 3, 3]


def test_the_inside_of_composites_is_shown_when_asked(files: Path, run: Run) -> None:
    (files / "net.py").write_text(
        "from torch import nn\ndef build(): return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)\n"
    )
    (files / "data.py").write_text("import torch\ndef loader(): return [(torch.zeros(2, 5, 8), torch.zeros(2))]\n")
    argv = ("sites", "net.py:build", "--data", "data.py:loader")
    outside, inside = run(*argv), run(*argv, "--inside")
    assert "self_attn" in outside.out
    assert "--inside" in outside.out
    assert "matmul" not in outside.out
    assert "matmul" in inside.out


def test_every_operation_that_can_be_computed_another_way_has_an_example() -> None:
    kinds = {site.kind for site in example_sites().values()}
    assert {kind for kind, operation in OPERATIONS.items() if operation.role == "integer"} <= kinds


def test_the_table_says_what_the_target_says() -> None:
    target, techniques = OnnxRuntime(threads=1), [Float(), Int(8, 8), Int(4, 8), Int(8, None)]
    table = support(target, techniques)
    for name, site in example_sites().items():
        for technique in techniques:
            fits = technique.fits(site)
            wanted = bool(fits) and bool(target.supports(technique, site))
            assert (table[name][technique] == "") is wanted
    assert table["add"][Int(8, None)] == "it has no weight, and Int(a=None) quantizes weights only"


def test_the_table_shows_each_reason_once_below(run: Run) -> None:
    said = run("targets", "onnxruntime", "--techniques", "Float()", "Int(8, 8)", "Int(4, 8)")
    assert said.code == 0, said.err
    conv = next(line for line in said.out.splitlines() if line.split()[:1] == ["conv2d"])
    assert conv.split()[:3] == ["conv2d", "yes", "yes"]
    assert conv.split()[3] == "no"
    number = conv.split()[4]
    reasons = [line for line in said.out.splitlines() if line.startswith(number)]
    assert len(reasons) == 1
    assert "below 8 bits" in reasons[0]
    assert said.out.count("no integer kernel for this operation") == 1


def test_the_table_as_json_has_the_reasons_in_the_targets_words(run: Run) -> None:
    table = json.loads(run("targets", "onnxruntime", "--json", "--techniques", "Int(8, 8)").out)
    assert table["linear"]["Int(w=8, a=8)"] is True
    assert table["einsum"]["Int(w=8, a=8)"] == "ONNX Runtime has no integer kernel for einsum"


def test_without_techniques_all_that_are_built_in_are_shown(run: Run) -> None:
    table = json.loads(run("targets", "onnxruntime", "--json").out)
    assert {"Float", "Int"} <= {name.partition("(")[0] for name in table["linear"]}


def test_a_technique_that_is_code_is_refused(run: Run) -> None:
    said = run("targets", "onnxruntime", "--techniques", "__import__('os').system('echo no')")
    assert said.code == 2
    assert "is none of" in said.err
    assert "no\n" not in said.out
