"""A report with everything in it, built from a seeded generator."""

from __future__ import annotations

import math
import random

import pytest

from bitsmith.report.data import FrontierPoint, Measure, Report, SiteRow

EVIL = '<script>alert("x")</script> & $\\frac{a}{b}$ \'"><img src=x onerror=alert(1)>'


def build(sites: int = 40, evil: bool = False) -> Report:
    rng = random.Random(3)
    rows = []
    for i in range(sites):
        refused = i % 9 == 4
        float_ms = rng.uniform(0.02, 0.5)
        rows.append(
            SiteRow(
                site=f"layer{i // 12 + 1}.{i % 12 // 3}.{('conv1', 'conv2', ':add')[i % 3]}",
                kind=("conv2d", "conv2d", "add")[i % 3],
                asked="Float()" if i == 0 else "Int(w=8, a=8)",
                realised="float32" if i == 0 or refused else "int8",
                why="no int8 kernel: its output is not quantized" if refused else "",
                sqnr_db=rng.uniform(25, 45) if i else math.inf,
                gap_db=rng.uniform(40, 60),
                agree=rng.uniform(0.99, 1.0),
                loss=0.0 if i == 0 else 10 ** rng.uniform(-5, -2),
                ms=float_ms * (1.0 if refused else rng.uniform(0.3, 0.6)),
                float_ms=float_ms,
                bytes=float(rng.randrange(500, 200_000)) if i % 3 < 2 else None,
                macs=rng.randrange(10_000, 5_000_000),
            )
        )
    if evil:
        rows[1] = SiteRow(EVIL, EVIL, EVIL, EVIL, EVIL, loss=0.5, ms=2.0, float_ms=3.0)
    frontier = tuple(
        FrontierPoint(
            f"plan {i}", 3.0 + 0.4 * i, 0.012 * math.exp(-0.5 * i), 0.1 + 0.05 * i, 0.02 / (i + 1), i % 3 != 2, i == 3
        )
        for i in range(9)
    )
    return Report(
        title=EVIL if evil else "ResNet-8 on digits",
        target=EVIL if evil else "onnxruntime",
        metric=EVIL if evil else "top-1",
        settings={"threads": 2, "graph optimization": "all", "shape": (1, 3, 32, 32), **({EVIL: EVIL} if evil else {})},
        versions={"bitsmith": "0.1.0", "onnxruntime": "1.31.1", "torch": "2.13.0"},
        machine={"cpu": EVIL if evil else "AMD EPYC, AVX512-VNNI", "cores": 2, "load": 0.4},
        budget={"drop": 0.01, "ms": 4.5, "mib": 0.2, "mj": 5.0},
        missed={"mib": 0.0794},
        split="test (never used for selection)",
        float_metric=Measure(351 / 359, low=0.957, high=0.989, n=359, unit="fraction"),
        plan_metric=Measure(350 / 359, low=0.953, high=0.987, n=359, unit="fraction"),
        drop=Measure(1 / 359, low=-0.004, high=0.012, n=359, unit="fraction"),
        float_ms=Measure(8.91, spread=0.12, n=30, unit="ms"),
        plan_ms=Measure(4.21, spread=0.05, n=30, unit="ms"),
        float_bytes=1_180_000,
        plan_bytes=293_000,
        frontier=frontier,
        sites=tuple(rows),
        verify={
            "whole_network_db": 45.4,
            "top_1_agreement": 0.9972,
            "tolerance_db": 30.0,
            "exact_db": math.inf,
            "passed": True,
        },
        time_parts={"sites": 3.6, "conversions": 0.31, "other": 0.12},
        time_whole=4.21,
        notes=(
            "4 sites ran in float32 although int8 was asked",
            EVIL if evil else "the machine was loaded while timing",
        ),
        predicted={"ms": 4.05, "bytes": 290_000.0, "loss": 0.004, "drop": 0.003},
        citations=(
            "Jacob et al. 2018, arXiv:1712.05877",
            EVIL if evil else "Nagel et al. 2021, https://arxiv.org/abs/2106.08295",
        ),
        seed=0,
        store={"hits": 120, "misses": 4},
    )


@pytest.fixture
def report() -> Report:
    return build()


@pytest.fixture
def evil() -> Report:
    return build(evil=True)
