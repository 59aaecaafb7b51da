"""What benchmarks measure with: rates are rates, and products are counted. No speed is claimed from here."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bitsmith_kernels import Winograd, compiler, isas, peak


def layer(isa: str, channels: int, tile: int = 2) -> Winograd:
    taps = (tile + 2) ** 2
    weights = np.ones((taps, channels, channels), np.int8)
    return Winograd(tile, 8, weights, np.full((taps, channels), 1024), np.ones((taps, channels)), None, isa=isa)


def test_a_peak_is_a_rate_and_the_reference_has_none() -> None:
    assert peak("reference", 8) == 0
    for isa in isas()[:-1]:
        assert peak(isa, 8) > 1e9
        assert peak(isa, 8) > 0.9 * peak(isa, 16)
    with pytest.raises(ValueError, match="isa is one of"):
        peak("neon", 8)
    with pytest.raises(ValueError, match="bits 8 or 16"):
        peak(isas()[0], 4)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("channels", [64, 96, 512])
def test_products_are_counted(tile: int, channels: int) -> None:
    for isa in isas()[:-1]:
        once, twice = (layer(isa, channels, tile).multiply(rounds) for rounds in (1, 2))
        assert twice == 2 * once
        tiles, rest = divmod(once, (tile + 2) ** 2 * channels * channels)
        assert tiles > 0
        assert rest == 0
    assert layer("reference", channels, tile).multiply(3) == 0


def test_channels_behind_the_last_whole_block_are_not_counted() -> None:
    for isa in isas()[:-1]:
        of_32, of_40 = (layer(isa, channels).multiply(1) for channels in (32, 40))
        tiles = of_32 // (16 * 32 * 32)
        blocks = 32 if isa == "avx512_vnni" else 40 // 16 * 16
        assert of_40 == tiles * 16 * blocks * 40
        assert layer(isa, 8).multiply(1) == 0


def test_the_compiler_is_named() -> None:
    assert re.match(r"(gcc|clang) \d+\.", compiler())
