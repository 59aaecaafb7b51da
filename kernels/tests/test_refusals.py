"""Wrong input is refused with words, and never computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitsmith_kernels import Winograd, isas


def arguments(tile: int = 2, bits: int = 8, channels_in: int = 3, channels_out: int = 5) -> dict[str, Any]:
    taps = (tile + 2) ** 2
    return {
        "tile": tile,
        "bits": bits,
        "u": np.ones((taps, channels_out, channels_in), np.int8 if bits == 8 else np.int16),
        "mul": np.full((taps, channels_in), 100),
        "us": np.ones((taps, channels_out), np.float32),
        "bias": np.zeros(channels_out, np.float32),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 6}, "tile must be 2 or 4"),
        ({"bits": 4}, "bits 8 or 16"),
        ({"u": np.ones((16, 5, 3), np.int16)}, "u is int16"),
        ({"u": np.ones((36, 5, 3), np.int8)}, r"must be int8 \(16, K, C\)"),
        ({"u": np.ones((16, 15), np.int8)}, "u is int8"),
        ({"u": np.ones((16, 5, 0), np.int8), "mul": np.ones((16, 0), int)}, "at least 1 of each"),
        ({"u": np.full((16, 5, 3), -128, np.int8)}, "-127 .. 127"),
        ({"mul": np.zeros((16, 3), int)}, "1 .. 32767"),
        ({"mul": np.full((16, 3), 32768)}, "1 .. 32767"),
        ({"mul": np.full((16, 3), 1.5)}, "integers"),
        ({"mul": np.full((36, 3), 5)}, "mul is"),
        ({"mul": np.full(16, 5)}, r"mul is .*must be integers \(16, 3\)"),
        ({"offset": np.zeros(5, int)}, r"offset is .*must be integers \(3,\)"),
        ({"offset": np.zeros(3)}, "offset is float64"),
        ({"offset": np.array([0, 0, 1021])}, r"offset holds 1021 at 2; must be in 0 \.\. 1020, which tap \(1, 1\)"),
        ({"offset": np.full(3, -1021), "x_zero": 255}, r"offset holds -1021 at 0; must be in -1020 \.\. 0"),
        ({"offset": np.full(3, 2**15)}, r"must be in -32768 \.\. 32767"),
        ({"us": np.ones((16, 4), np.float32)}, "us is"),
        ({"us": np.full((16, 5), np.nan, np.float32)}, "us holds nan.*finite"),
        ({"us": np.full((16, 5), 1e300)}, "us holds inf.*finite"),
        ({"us": np.full((16, 5), 1e21)}, "at most 1e20"),
        ({"us": np.ones((16, 5), complex)}, "real numbers"),
        ({"bias": np.full(5, -np.inf)}, "bias holds -inf"),
        ({"bias": np.zeros(4)}, "bias is"),
        ({"x_zero": 256}, "x zero point is 256"),
        ({"x_zero": -1}, "x zero point is -1"),
        ({"x_zero": 200, "x_signed": True}, "-128 .. 127"),
        ({"x_zero": 2**40}, "32 bits"),
        ({"x_zero": 0.5}, "integer"),
        ({"pads": (1, 1, 1)}, "top, left, bottom, right"),
        ({"pads": (1, 1, 3, 1)}, "a pad is 3"),
        ({"pads": (1, -1, 0, 1)}, "a pad is -1"),
        ({"isa": "sse2"}, "isa is 'sse2'; this CPU and build have .*reference"),
    ],
)
def test_layers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Winograd(**(arguments() | change))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("x_signed", [False, True])
def test_overflow_of_16_bits_is_refused_at_the_bound_and_not_below(isa: str, x_signed: bool) -> None:
    """Tap (0, 0) of F(2, 3) is d00 - d02 - d20 + d22, so |D| <= 510; mul 32767 leaves 510."""
    given = arguments(2, 16, channels_in=200, channels_out=2)
    given |= {"mul": np.full((16, 200), 32767), "u": np.zeros((16, 2, 200), np.int16), "isa": isa, "x_signed": x_signed}
    given["x_zero"] = -128 if x_signed else 0
    # zero point 0: D is at most 255 * 2 at both ends
    most = (2**31 - 1) // 510
    given["u"][0, 1, :] = most // 200
    given["u"][0, 1, 0] += most % 200
    assert int(given["u"][0, 1].sum()) == most
    Winograd(**given)
    given["u"][0, 1, 5] += 1
    with pytest.raises(ValueError, match=r"tap 0 and output channel 1 .* is 2147484030; must be below 2\^31"):
        Winograd(**given)
    given["mul"][0, 5] = 16384  # this channel leaves half
    Winograd(**given)


def test_overflow_of_8_bits_is_refused_by_channels() -> None:
    with pytest.raises(ValueError, match=r"132105 input channels.*at most 132104"):
        Winograd(**arguments(channels_in=132105, channels_out=1))
    Winograd(**arguments(channels_in=132104, channels_out=1))


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.int8), {}, "x is int8"),
        (np.zeros((1, 4, 4, 3), np.float32), {}, "x is float32"),
        (np.zeros((1, 4, 4, 4), np.uint8), {}, r"must be uint8 \(N, H, W, 3\)"),
        (np.zeros((4, 4, 3), np.uint8), {}, "x is uint8"),
        (np.zeros((1, 0, 4, 3), np.uint8), {}, "at least 1 x 1"),
        (None, {"scale": 0.0}, "output scale"),
        (None, {"scale": -1.0}, "output scale"),
        (None, {"scale": float("nan")}, "output scale"),
        (None, {"scale": float("inf")}, "output scale"),
        (None, {"zero": 300}, "output zero point is 300"),
        (None, {"zero": -1}, "output zero point"),
        (None, {"zero": 200, "signed": True}, "-128 .. 127"),
        (None, {"low": 5, "high": 4}, "ordered"),
        (None, {"low": -1}, "ordered"),
        (None, {"high": 256}, "ordered"),
        (None, {"threads": 0}, "threads"),
        (None, {"threads": 5000}, "threads"),
        (None, {"residual": np.zeros((1, 4, 4, 4), np.uint8)}, "residual is"),
        (None, {"residual": np.zeros((1, 4, 4, 5), np.int16)}, "residual is"),
        (None, {"residual": np.zeros((1, 4, 4, 5), np.uint8), "residual_scale": float("nan")}, "residual scale"),
        (None, {"residual": np.zeros((1, 4, 4, 5), np.uint8), "residual_zero": -3}, "residual zero point"),
    ],
)
def test_calls(x: Any, change: dict[str, Any], message: str) -> None:
    layer = Winograd(**arguments())
    x = np.zeros((1, 4, 4, 3), np.uint8) if x is None else x
    with pytest.raises(ValueError, match=message):
        layer(x, **({"scale": 1.0} | change))


def test_map_smaller_than_the_kernel() -> None:
    layer = Winograd(**arguments(), pads=(0, 0, 0, 0))
    with pytest.raises(ValueError, match="smaller than the 3 x 3 kernel"):
        layer(np.zeros((1, 2, 5, 3), np.uint8), scale=1.0)


def test_an_empty_batch_gives_an_empty_batch() -> None:
    for isa in isas():
        y = Winograd(**arguments(), isa=isa)(np.zeros((0, 4, 6, 3), np.uint8), scale=1.0, threads=2)
        assert y.shape == (0, 4, 6, 5)


def test_what_an_inspector_reads() -> None:
    assert isas()[-1] == "reference"
    layer = Winograd(**arguments())
    assert layer.isa == isas()[0]
    assert repr(layer) == f"Winograd(tile=2, bits=8, 3 -> 5 channels, isa='{isas()[0]}')"
    assert layer.packed_bytes >= 16 * 5 * 3


@pytest.mark.parametrize("isa", isas())
def test_overflow_counts_what_the_offset_adds(isa: str) -> None:
    """Tap (1, 1) of F(2, 3) is a sum of four pixels: with an offset of half |V| <= 510, and base is 510 for each u."""
    given = arguments(2, 16, channels_in=200, channels_out=2)
    given |= {"mul": np.full((16, 200), 32767), "u": np.zeros((16, 2, 200), np.int16), "isa": isa}
    given["u"][5, 1, :] = 2**31 // 1020 // 200
    given["offset"] = np.full(200, 510)
    Winograd(**given)
    given["u"][5, 1, :] += 1  # base is rounded down a little
    Winograd(**given)
    given["u"][5, 1, :] += 1
    with pytest.raises(ValueError, match=r"tap 5 and output channel 1 \|base\| \+ .* is 2147[0-9]{6}; must be below"):
        Winograd(**given)
