"""One layer from several threads, and after fork."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bitsmith_kernels import Winograd


@pytest.fixture
def made() -> tuple[Winograd, dict[str, Any]]:
    rng = np.random.default_rng(0)
    u = rng.integers(-127, 128, (16, 64, 64)).astype(np.int8)
    layer = Winograd(2, 8, u, np.full((16, 64), 3000), np.full((16, 64), 0.001), None)
    return layer, {"x": rng.integers(0, 256, (1, 14, 14, 64), np.uint8), "scale": 1.0, "zero": 128}


def test_callers_on_many_threads(made: tuple[Winograd, dict[str, Any]]) -> None:
    layer, call = made
    expected = layer(**call)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda i: layer(**call, threads=1 + i % 3), range(60)):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(made: tuple[Winograd, dict[str, Any]]) -> None:
    layer, call = made
    expected = layer(**call, threads=3)
    child = os.fork()
    if child == 0:
        same = bool((layer(**call, threads=3) == expected).all())
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
