"""Generated weights against dense and pruned ones on a modelled FPGA engine: ``python -m studies.unzip_fpga``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import table

from .._command import Study
from .._guided import RESULTS, library
from .engines import BANDWIDTHS, BUDGET, DENSE, ENGINES, HELD, NETWORKS, Engine, modelled, shapes, shares

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
    held: dict[str, Mapping[str, float]] = {}
    for name in study.chosen:
        known = shapes(name)
        held[name] = shares(known)
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
    weights(study.chosen, found, held)
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


def weights(names: Sequence[str], found: Rows, held: Mapping[str, Mapping[str, float]]) -> None:
    """How much of each network the weights are: of what is stored, and of what dense engines move."""
    engines = [e for e in ENGINES if e in (DENSE, HELD)]
    columns = ["network", "weights, M", "in kernels of 1", "in the last layer"]
    columns += [f"{engine.name}, {b:g}x" for engine in engines for b in BANDWIDTHS]
    rows = []
    for name in names:
        own = held[name]
        row = [name, f"{own['millions']:.1f}", f"{own['pointwise']:.0%}", f"{own['last']:.0%}"]
        for engine in engines:
            for bandwidth in BANDWIDTHS:
                moved = found.get((name, engine.name, bandwidth))
                row.append("-" if moved is None else f"{moved['mb_weights'] / moved['mb_moved']:.0%}")
        rows.append(row)
    table("How much the weights are: of the network, and of the bytes that an engine moves", columns, rows)


def tell(names: Sequence[str], found: Rows) -> None:
    columns = ["engine", *(f"bandwidth {bandwidth:g}x" for bandwidth in BANDWIDTHS)]
    rows = [[e.name, *(said(speedups(names, found, e, DENSE, b)) for b in BANDWIDTHS)] for e in ENGINES]
    table("Modelled speed-up over the dense engine: geometric mean over networks (range)", columns, rows)
    rows = [[e.name, *(said(speedups(names, found, e, HELD, b)) for b in BANDWIDTHS)] for e in ENGINES if e.ratio]
    table("Modelled speed-up over the dense engine that keeps its design of 1x", columns, rows)
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
