"""Generated weights against dense and pruned ones on a modelled FPGA engine: ``python -m studies.unzip_fpga``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import table

from .._command import Study
from .._guided import RESULTS, library
from .engines import BANDWIDTHS, BUDGET, DENSE, ENGINES, NETWORKS, Engine, modelled, shapes

PUBLISHED = (2.14, 1.71)
Rows = Mapping[tuple[str, str, float], Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "unzip_fpga",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(NETWORKS),
        seeds=1,
        full="the same: nothing is left out",
        store="unzip_fpga",
    )
    print(
        f"modelled, not measured: {BUDGET.dsps} DSPs, {BUDGET.bram_kib:g} KiB, {BUDGET.clock_mhz:g} MHz, 16-bit values"
    )
    found: dict[tuple[str, str, float], Mapping[str, Any]] = {}
    for name in study.chosen:
        known = shapes(name)
        for bandwidth in BANDWIDTHS:
            for engine in ENGINES:
                key = {"network": name, "engine": repr(engine), "bandwidth": bandwidth, "budget": repr(BUDGET)}
                key["library"] = library("targets", "zoo")
                row = study.row(
                    "unzip fpga",
                    key,
                    f"{name}, {engine.name}, bandwidth {bandwidth:g}",
                    lambda known=known, engine=engine, bandwidth=bandwidth: modelled(known, engine, bandwidth),
                )
                if row is not None:
                    found[name, engine.name, bandwidth] = row
                    study.rows.append({"network": name, "engine": engine.name, "bandwidth": bandwidth, **row})
    tell(study.chosen, found)
    plot(study.chosen, found, RESULTS / "unzip_fpga.svg")
    study.finish()


def speedups(names: Sequence[str], found: Rows, engine: Engine, over: Engine, bandwidth: float) -> list[float]:
    """Of an engine over another one, by network."""
    pairs = [(found.get((n, over.name, bandwidth)), found.get((n, engine.name, bandwidth))) for n in names]
    return [one["ms"] / other["ms"] for one, other in pairs if one is not None and other is not None]


def said(values: Sequence[float]) -> str:
    """Geometric mean and range over networks."""
    if not values:
        return "-"
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def tell(names: Sequence[str], found: Rows) -> None:
    columns = ["engine", *(f"bandwidth {bandwidth:g}x" for bandwidth in BANDWIDTHS)]
    rows = [[e.name, *(said(speedups(names, found, e, DENSE, b)) for b in BANDWIDTHS)] for e in ENGINES]
    table("Modelled speed-up over the dense engine: geometric mean over networks (range)", columns, rows)
    pruned = [engine for engine in ENGINES if engine.kept < 1.0]
    for engine in (engine for engine in ENGINES if engine.ratio is not None and engine.selective):
        rows = [[p.name, *(said(speedups(names, found, engine, p, b)) for b in BANDWIDTHS)] for p in pruned]
        table(f"{engine.name}: modelled speed-up over pruned engines", ["over", *columns[1:]], rows)
    for name in names:
        rows = []
        for engine in ENGINES:
            for bandwidth in BANDWIDTHS:
                row = found.get((name, engine.name, bandwidth))
                if row is not None:
                    design, bound = row["design"], row["bound"]
                    tiles = f"{design['rows']}, {design['depth']}, {design['columns']}, {design['lanes']}"
                    parts = f"{bound['compute']} / {bound['generate']} / {bound['transfer']}"
                    rows.append(
                        [
                            engine.name,
                            f"{bandwidth:g}",
                            f"{row['ms']:.2f}",
                            f"{row['gmacs']:.2f}",
                            f"{row['mb_stored']:.1f}",
                            f"{row['mb_moved']:.1f}",
                            tiles,
                            parts,
                        ]
                    )
        heads = ["engine", "bandwidth", "ms", "GMAC", "MB stored", "MB moved", "T_R, T_P, T_C, M", "bound by"]
        table(f"{name}, one image (bound by: layers that compute, generate, transfer)", heads, rows)
    dense, over_pruned = PUBLISHED
    print(f"\npublished: {dense}x over dense and {over_pruned}x over pruned engines, mean under constrained bandwidth")


def plot(names: Sequence[str], found: Rows, path: Path) -> None:
    """Speed-up over the dense engine against bandwidth."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for engine in ENGINES:
        style = ":" if engine.kept < 1.0 else "-" if engine.ratio is None else "--"
        values = [speedups(names, found, engine, DENSE, bandwidth) for bandwidth in BANDWIDTHS]
        means = [statistics.geometric_mean(v) if v else float("nan") for v in values]
        axes.plot(BANDWIDTHS, means, style, marker="o", markersize=4, label=engine.name)
    axes.axhline(PUBLISHED[0], color="0.6", linewidth=0.8)
    axes.annotate("published mean over dense, 2.14", (1.0, PUBLISHED[0]), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BANDWIDTHS, [f"{bandwidth:g}x" for bandwidth in BANDWIDTHS])
    axes.set_xlabel("bandwidth")
    axes.set_ylabel("speed-up over dense (modelled)")
    axes.grid(True, color="0.9")
    axes.legend(fontsize=7, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
