"""The example that explores for every target: each name stands for a target, and its last lines say what was chosen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bitsmith.cli import arguments
from bitsmith.targets import Target
from repository import ROOT

EXAMPLE = ROOT / "examples" / "explore_resnet20.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("explore_resnet20", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "explore_resnet20", module)
    spec.loader.exec_module(module)
    return module


def test_every_name_is_a_target(example: ModuleType) -> None:
    if example.data_root() is None:
        pytest.skip("the energy tables lie in the data folder")
    for name, (text, objective, package) in example.TARGETS.items():
        if package and importlib.util.find_spec(package) is None:
            continue
        target = arguments.target(text)
        assert isinstance(target, Target), name
        assert objective in ("latency", "energy")
        assert objective == "latency" or target.source == "modelled"


def test_it_says_what_was_chosen(example: ModuleType) -> None:
    measured = {"mj": 0.2, "mib": 0.25, "metric": 0.91, "drop": 0.008, "drop_interval": [-0.002, 0.018], "samples": 500}
    found = {
        "points": [{"chosen": False}, {"chosen": True, **measured}],
        "float": {"mj": 0.8, "mib": 1.0, "metric": 0.918},
        "techniques": [{"technique": "Int(w=8, a=8)", "chosen": 12}, {"technique": "Adder()", "chosen": 0}],
        "minimize": "mj",
        "metric": "top-1",
    }
    assert example.told(found) == (
        "0.8 -> 0.2 mj, 1.00 -> 0.25 MiB; top-1 0.918 -> 0.910, drop 0.8 points (-0.2 to 1.8, n=500); "
        "Int(w=8, a=8) at 12"
    )


def test_a_wrong_name_is_told_before_anything_is_read(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        example.main(["--target", "abacus", "-o", str(tmp_path)])
    assert not list(tmp_path.iterdir())
