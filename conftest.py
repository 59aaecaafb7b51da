"""What every test and every doctest shares: the number of processes and threads, exports in half the time, the data."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter import _registration

from bitsmith.zoo.data import data_root

# One a process, as many as the default suite has cores for; a sum's last bits change with it, and so does a training.
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; none beside this one where tests are named, for these begin at once."""
    return 0 if config.option.file_or_dir or config.option.keyword else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if data_root() is None:
        skip = pytest.mark.skip(reason="no data folder: set BITSMITH_DATA (default ../shared/data)")
        for item in items:
            if item.get_closest_marker("data") is not None:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def operators_are_collected_once() -> Any:
    """torch's exporter parses the sources of its 500 operators anew for each file: half the time of a small network.

    They are the same each time; every export still gets a registry of its own, which may take further operators.
    """
    registry: Any = _registration.ONNXRegistry
    collected = functools.cache(registry.from_torchlib)

    def from_torchlib(*arguments: Any, **options: Any) -> Any:
        found, known = registry(), collected(*arguments, **options)
        found.__dict__.update(known.__dict__)
        found.functions = {operator: list(functions) for operator, functions in known.functions.items()}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(from_torchlib))
        yield
