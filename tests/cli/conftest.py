"""A model and its data as files, and the command line run in this process."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bitsmith.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: object) -> Said:
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with net.py (a small convolutional network) and data.py (its task), made the working folder."""
    (tmp_path / "net.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def build():
                torch.manual_seed(0)
                return nn.Sequential(
                    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
                )
            """
        )
    )
    (tmp_path / "data.py").write_text(
        textwrap.dedent(
            """
            import net
            import torch
            from bitsmith.metrics import top1
            from bitsmith.task import Task

            def batches(seed):
                rng = torch.Generator().manual_seed(seed)
                model = net.build().eval()
                xs = [torch.randn(16, 3, 12, 12, generator=rng) for _ in range(2)]
                with torch.no_grad():
                    return [(x, model(x).argmax(1)) for x in xs]

            def task():
                return Task(batches(1), batches(2), metric=top1, loss=torch.nn.functional.cross_entropy)
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
