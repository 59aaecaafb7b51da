"""F(2x2, 3x3) of 8 bits, written in Halide against the C++ of this folder: CPU time of a layer on one thread.

    pip install halide && pip install ./kernels && taskset -c 0 python kernels/bench/halide_layers.py

A chain of ten layers, in turn with the other's, as ``layers`` times them: with weights of their own, then with the same
(hot). Halide's part does less: it is compiled for one shape of an even size, its input is padded already, and it has no
residual and no zero point. What a call from Python costs is taken off both: that of a function which does nothing.
"""

from __future__ import annotations

import ctypes as c
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import halide as hl
import numpy as np

from bitsmith_kernels import Winograd
from bitsmith_kernels._library import Call, Levels

DEPTH, ROUNDS = 10, 301
SHAPES = ((64, 56, 1), (128, 28, 1), (256, 14, 2))
"""Channels, size of the map, and rows of tiles of a block in Halide: with 14 tiles in a row of them."""

B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float64)
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def halide_layer(channels: int, size: int, rows: int) -> Any:
    """A function of (padded image, weights, compensation, scales, bias, multipliers, output)."""
    image, weights = hl.ImageParam(hl.UInt(8), 3, "image"), hl.ImageParam(hl.Int(8), 5, "weights")
    less, scales = hl.ImageParam(hl.Int(32), 3, "less"), hl.ImageParam(hl.Float(32), 3, "scales")
    bias, mul = hl.ImageParam(hl.Float(32), 1, "bias"), hl.ImageParam(hl.Int(16), 2, "mul")
    ch, k, tx, ty, i, j, x, y, dx, dy = (hl.Var(f"axis{n}") for n in range(10))

    def turned(of: Callable[[int], Any], which: Any) -> Any:
        return hl.mux(which, [of(0) - of(2), of(1) + of(2), of(2) - of(1), of(1) - of(3)])

    row, taps, sums, kept, half, whole, out = (hl.Func(f"stage{n}") for n in range(7))
    row[ch, tx, y, i] = turned(lambda at: hl.i16(image[ch, 2 * tx + at, y]), i)
    d = turned(lambda at: row[ch, tx, 2 * ty + at, i], j)
    taps[ch, tx, ty, i, j] = hl.u8(hl.i16((hl.i32(d) * hl.i32(mul[i, j]) + 16384) >> 15) + hl.i16(128))
    r = hl.RDom([hl.Range(0, 4), hl.Range(0, channels // 4)], "r")
    sums[k, tx, ty, i, j] = less[k, i, j]
    sums[k, tx, ty, i, j] += hl.i32(taps[4 * r.y + r.x, tx, ty, i, j]) * hl.i32(weights[r.x, k, r.y, i, j])
    kept[k, tx, ty, i, j] = sums[k, tx, ty, i, j]

    def joined(of: Callable[[int], Any], which: Any) -> Any:
        return hl.mux(which, [of(0) + (of(1) + of(2)), (of(1) - of(2)) - of(3)])

    half[k, tx, ty, dx, j] = joined(lambda at: hl.f32(kept[k, tx, ty, at, j]) * scales[k, at, j], dx)
    whole[k, tx, ty, dx, dy] = joined(lambda at: half[k, tx, ty, dx, at], dy)
    out[k, x, y] = hl.u8_sat(hl.i32(hl.round(whole[k, x // 2, y // 2, x % 2, y % 2] + bias[k])))

    ko, ki, kv, kk, xo, xi, yo, yi, t1, t2, txo, txi = (hl.Var(f"part{n}") for n in range(12))
    out.bound(k, 0, channels).bound(x, 0, size).bound(y, 0, size)
    out.split(k, ko, ki, 32).split(y, yo, yi, 2 * rows).split(x, xo, xi, 2).split(yi, t1, t2, 2)
    out.reorder(ki, xi, t2, xo, t1, ko, yo).vectorize(ki, 16).unroll(ki).unroll(xi).unroll(t2)
    half.compute_at(out, xo).vectorize(k, 16).unroll(k).unroll(dx).unroll(j)
    taps.compute_at(out, yo).bound(i, 0, 4).bound(j, 0, 4).reorder(i, j, ch, tx, ty).split(ch, ch, kv, 32)
    taps.reorder(kv, i, j, ch, tx, ty).vectorize(kv).unroll(i).unroll(j)
    row.compute_at(taps, ch).vectorize(ch, 32).unroll(i).unroll(y).unroll(tx)
    kept.compute_at(out, ko).bound(i, 0, 4).bound(j, 0, 4).split(tx, txo, txi, 14 if size % 28 == 0 else 7)
    kept.reorder(k, txi, ty, txo, i, j).vectorize(k, 16).unroll(k).unroll(txi).unroll(ty)
    sums.compute_at(kept, txo).vectorize(k, 16).unroll(k).unroll(tx).unroll(ty)
    update = sums.update().split(k, kk, kv, 16).reorder(r.x, kv, kk, tx, ty, r.y)
    update.atomic().vectorize(r.x).vectorize(kv).unroll(kk).unroll(tx).unroll(ty)

    padded = size + 2
    image.dim(0).set_bounds(0, channels)
    image.dim(1).set_bounds(0, padded).set_stride(channels)
    image.dim(2).set_bounds(0, padded).set_stride(channels * padded)
    extents = (4, channels, channels // 4, 4, 4)
    stride = 1
    for axis, extent in enumerate(extents):
        weights.dim(axis).set_bounds(0, extent).set_stride(stride)
        stride *= extent
    return out.compile_to_callable([image, weights, less, scales, bias, mul], hl.get_host_target())


def empty_call() -> float:
    """Seconds of a Halide function of as many buffers that computes next to nothing."""
    given = [hl.ImageParam(hl.UInt(8), 1, f"p{n}") for n in range(6)]
    x, out = hl.Var("x"), hl.Func("out")
    out[x] = given[0][x] + given[1][x] + given[2][x] + given[3][x] + given[4][x] + given[5][x]
    kernel = out.compile_to_callable(given, hl.get_host_target())
    buffers = [hl.Buffer(np.zeros(1, np.uint8)) for _ in range(7)]
    return statistics.median(seconds(lambda: [kernel(*buffers) for _ in range(DEPTH)]) for _ in range(ROUNDS))


def empty_ours() -> float:
    """The same of ours: a layer of one channel on one pixel."""
    layer = Winograd(2, 8, np.ones((16, 1, 1), np.int8), np.ones(16, np.int16), np.ones((16, 1), np.float32), None)
    x, y, levels = np.zeros(1, np.uint8), np.zeros(1, np.uint8), Levels(1.0, 0, 0)
    own = {"x": x.ctypes.data, "y": y.ctypes.data, "y_levels": levels, "residual_levels": levels, "high": 255}
    call = Call(batch=1, height=1, width=1, threads=1, **own)

    def run() -> None:
        for _ in range(DEPTH):
            layer._library.bitsmith_layer_run(layer._layer, c.byref(call))

    return statistics.median(seconds(run) for _ in range(ROUNDS))


def chains(
    channels: int, size: int, rows: int
) -> tuple[Callable[[bool], None], Callable[[bool], None], list[tuple[Any, Any]]]:
    """The same ten layers by Halide and by C++ (all of them, or the first ten times), and what each wrote, in pairs."""
    draw = np.random.default_rng(0)
    padded = np.zeros((2, size + 2, size + 2, channels), np.uint8)
    padded[:, 1:-1, 1:-1] = np.clip(draw.normal(0, 60, (2, size, size, channels)), 0, 255)
    images = np.ascontiguousarray(padded[:, None, 1:-1, 1:-1])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (1, 2))[:, ::2, ::2].astype(np.float64)
    # no tap leaves int8: where one did, Halide's would wrap around and ours saturate
    peaks = np.abs(np.einsum("ai,lnmcij,bj->ablnmc", B, windows, B, optimize=True)).max((2, 3, 4, 5))
    mul = np.minimum(np.floor(127 / peaks * 2**15), 2**15 - 1).astype(np.int16)
    bias, scale = np.full(channels, 20, np.float32), 1 / (35 * np.sqrt(9 * channels) * 0.7)
    kernel = halide_layer(channels, size, rows)
    theirs, ours, written = [], [], []
    for n in range(DEPTH):
        w = np.clip(draw.normal(0, 35, (channels, channels, 3, 3)), -127, 127)  # out, in
        real = np.ascontiguousarray(np.einsum("ai,kcij,bj->abkc", G, w, G, optimize=True))
        unit = np.abs(real).max(3) / 127
        u = np.rint(real / unit[..., None]).astype(np.int8)
        us = (unit * (2.0**15 / mul)[:, :, None] * scale).astype(np.float32)
        grouped = np.ascontiguousarray(u.reshape(4, 4, channels, channels // 4, 4).transpose(0, 1, 3, 2, 4))
        less = -128 * u.sum(3, dtype=np.int32)
        first, second = np.zeros((size, size, channels), np.uint8), np.zeros((1, size, size, channels), np.uint8)
        parts = [padded[n % 2], grouped, less, us, bias, mul, first]
        # Halide's first axis is the innermost; of the taps, its i runs along the map's width: the last of ours
        theirs.append([hl.Buffer(part) for part in parts])
        factors = np.repeat(mul.reshape(16, 1), channels, 1)
        layer = Winograd(2, 8, u.reshape(16, channels, channels), factors, us.reshape(16, -1), bias)
        own = {"x": images[n % 2].ctypes.data, "y": second.ctypes.data, "y_levels": Levels(1.0, 0, 0), "high": 255}
        call = Call(batch=1, height=size, width=size, relu=1, threads=1, residual_levels=Levels(1.0, 0, 0), **own)
        ours.append((layer, call, images))  # the call has addresses only
        written.append((first, second))

    def run_halide(hot: bool) -> None:
        for n in range(DEPTH):
            kernel(*theirs[0 if hot else n])

    def run_ours(hot: bool) -> None:
        for n in range(DEPTH):
            layer, call, _ = ours[0 if hot else n]
            layer._library.bitsmith_layer_run(layer._layer, c.byref(call))

    return run_halide, run_ours, written


def seconds(run: Callable[..., Any], *given: bool) -> float:
    begin = time.thread_time()
    run(*given)
    return (time.thread_time() - begin) / DEPTH


def shown(times: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in statistics.quantiles(times, n=4))
    return f"{middle} ({low} to {high})"


def main() -> None:
    print(f"halide {metadata.version('halide')}, bitsmith-kernels {metadata.version('bitsmith-kernels')}")
    calls = empty_call() * 1e3, empty_ours() * 1e3
    print(f"a call from Python, taken off: Halide {calls[0]:.4f} ms, C++ {calls[1]:.4f} ms")
    for channels, size, rows in SHAPES:
        run_halide, run_ours, written = chains(channels, size, rows)
        run_halide(False)
        run_ours(False)
        same = np.mean([np.mean(theirs == ours[0]) for theirs, ours in written])
        apart = max(np.abs(theirs.astype(int) - ours[0]).max() for theirs, ours in written)
        print(f"{channels}@{size}: {same:.4%} of the levels are the same, the others {apart} apart")
        for hot in (False, True):
            pairs = [
                (seconds(run_halide, hot) * 1e3 - calls[0], seconds(run_ours, hot) * 1e3 - calls[1])
                for _ in range(20 + ROUNDS)
            ][20:]
            print(
                f"  {'hot' if hot else 'ten'}: Halide {shown([a for a, _ in pairs], 4)} ms, C++ "
                f"{shown([b for _, b in pairs], 4)} ms, Halide / C++ {shown([a / b for a, b in pairs], 2)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
