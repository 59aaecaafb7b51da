"""What quantization does to a sum over neighbours, by in-degree, and how many operations become integer (modelled)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import table
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.numerics.degrees import in_degrees, messages_of

from .networks import qat

BINS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 10**9))
"""Least and greatest in-degree of a group of nodes."""

PLOT = Path(__file__).parents[2] / "docs" / "_static" / "degree_quant_error.svg"


def by_degree(net: nn.Module, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> list[list[float]]:
    """``[nodes, mean absolute error, its 90th percentile]`` by group, of what GIN's second layer adds up: under the
    plan against the same weights in float. In units of the standard deviation of the float sums."""
    model.load_state_dict({name: value for name, value in net.state_dict().items() if not name.startswith("_bitsmith")})
    plain, rounded = (_sums(one, inputs) for one in (model, net))
    messages, nodes = messages_of(inputs[1], len(inputs[0]))
    degree = in_degrees(messages, nodes)
    gap = ((rounded - plain).abs() / plain.std()).mean(1)
    found = []
    for least, greatest in BINS:
        chosen = gap[(degree >= least) & (degree <= greatest)]
        found.append([len(chosen), float(chosen.mean()), float(chosen.quantile(0.9))] if len(chosen) else [0, 0.0, 0.0])
    return found


def _sums(net: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """What the MLP of the second layer reads: a node and the sum of its neighbours."""
    seen: list[Tensor] = []
    hook = net.second.nn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            net.eval()(*inputs)
    finally:
        hook.remove()
    return seen[0]


def show(errors: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The table, and the plot where the documentation has its pictures."""
    if not errors:
        return
    names = [
        f"{least}" if least == most else f"{least}-{most}" if most < 10**9 else f"{least}+" for least, most in BINS
    ]
    counts = [str(int(group[0])) for group in next(iter(errors.values()))]
    lines = [["nodes", *counts], *([name, *(f"{g[1]:.3f}" for g in groups)] for name, groups in errors.items())]
    title = "cora, GIN, seed 0: mean absolute error of the sums of layer 2 by in-degree, in standard deviations"
    table(title, ("in-degree", *names), lines)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, groups in errors.items():
        axes.plot(names, [group[1] for group in groups], marker="o", label=name)
    axes.set(xlabel="in-degree", ylabel="mean error / deviation of the sums", yscale="log", title="Cora, GIN, layer 2")
    axes.legend()
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def operations(kind: str, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    """Multiplications and additions of the recorded sites, and the part that the plan makes integer: counted, as no
    runtime here has the kernels."""
    sites = bs.sites(model, inputs)
    plan = qat(8).plan(sites)
    edges = len(messages_of(inputs[1], len(inputs[0]))[0].source)
    counts: dict[bool, int] = {True: 0, False: 0}
    for name, site in sites.items():
        if site.kind == "spmm":
            count = edges * site.out_shapes[0][1]
        elif site.kind in ("scatter_add", "scatter_reduce"):
            count = math.prod(site.operands[1].shape)
        else:
            count = site.macs or math.prod(site.out_shapes[0])
        counts[name in plan.sites] += count
    total = sum(counts.values())
    print(f"{kind}: {total / 1e6:.1f} M operations, {100 * counts[True] / total:.1f} % of them on integers (modelled)")
