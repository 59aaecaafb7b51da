"""Memory that is freed is kept for the next tensors, unless the environment says otherwise; no cycles are sought."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bitsmith import _memory
from bitsmith.export.program import ExportError, exported_program

FAULTS = """
import resource, sys
import torch
from bitsmith._memory import give_back, keep_freed
if "keep" in sys.argv:
    assert keep_freed()
torch.set_num_threads(1)
def work():
    for _ in range(20):
        torch.ones(2**24).add(1)  # two blocks of 64 MiB, beyond what glibc keeps by itself
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
held = resident()
give_back()
print(held - resident())
"""


def told(*arguments: str, **environment: str) -> list[int]:
    """What a fresh process printed: pages that had to be cleared, bytes given back."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, *arguments]
    got = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    return [int(line) for line in got.stdout.split()]


@pytest.mark.skipif(_memory._glibc() is None, reason="not glibc")
def test_pages_are_cleared_once_and_go_back_at_the_end() -> None:
    plain, _ = told()
    kept, returned = told("keep")
    assert plain > 20 * 2**14, "without it each block is cleared anew, 4096 bytes at a time"
    assert kept < plain / 20
    assert returned >= 2**26


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not _memory.keep_freed()


@pytest.mark.parametrize("enabled", [True, False])
def test_an_export_goes_on_without_the_collector(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves it as it was, after an error too."""
    seen: list[bool] = []
    real = torch.export.export

    def watched(*args: Any, **named: Any) -> Any:
        seen.append(gc.isenabled())
        return real(*args, **named)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        monkeypatch.setattr(torch.export, "export", watched)
        exported_program(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        assert gc.isenabled() is enabled
        monkeypatch.setattr(torch.export, "export", fails)
        with pytest.raises(ExportError):
            exported_program(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    _memory._glibc.cache_clear()
    try:
        assert not _memory.keep_freed()
        _memory.give_back()
    finally:
        _memory._glibc.cache_clear()
