"""Names that are loaded when they are asked for are those that the module says it has."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest

import bitsmith as bs
from bitsmith._lazy import loader


@pytest.mark.parametrize("module", [bs.searches, bs.sensitivities], ids=["searches", "sensitivities"])
def test_every_name_is_there(module: ModuleType) -> None:
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match=rf"{module.__name__}' has no attribute 'Bogus'"):
        module.Bogus  # noqa: B018


def test_a_module_is_loaded_for_its_name_alone() -> None:
    code = (
        "import json, sys\nimport bitsmith as bs\n"
        "seen = lambda: [n for n in ('search.pareto', 'search.greedy') if f'bitsmith.{n}' in sys.modules]\n"
        "before = seen()\nbs.searches.Greedy()\nprint(json.dumps([before, seen()]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[], ["search.greedy"]]


def test_a_place_that_lacks_the_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        loader("here", {"Nothing": "plan"})("Nothing")
