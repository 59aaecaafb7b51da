"""Training under Degree-Quant against plain training for integers: ``python -m studies.degree_quant``."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import table
from torch import Tensor
from torch_geometric.utils import to_torch_csr_tensor

import bitsmith as bs
from bitsmith.zoo.data import cora, data_root
from bitsmith.zoo.graph_sets import Graph, attachment_graphs, graph_file, molecules

from .._command import Study, by, spread
from . import error
from .networks import RECIPE, SETTINGS, Trained, accuracy, auroc, node_net, train_graphs, train_nodes

SHARES = {"cora": 0.6, "error": 0.05, "attachment": 0.12, "imdb": 0.13, "molecules": 0.1}
"""Of the time, by part."""

KINDS = ("GCN", "GIN", "GAT")
SMALL = ("fp32", "QAT INT8", "DQ INT8", "QAT INT4", "DQ INT4")
"""Settings of the sets of graphs."""

SETS: Mapping[str, Mapping[str, Any]] = {
    "attachment": {"epochs": 12, "hidden": 32, "layers": 3},
    "imdb": {"epochs": 12, "hidden": 32, "layers": 3},
    "BBBP": {"epochs": 8, "hidden": 32, "layers": 3},
    "clintox": {"epochs": 8, "hidden": 32, "layers": 3},
}
FULL = {"epochs": 100, "hidden": 64, "layers": 5}
EPOCHS, FULL_EPOCHS = 40, 200


def graphs_of(name: str, root: Path) -> list[Graph]:
    if name == "attachment":
        return attachment_graphs(600, seed=0)
    if name == "imdb":
        return graph_file(root, "IMDBBINARY", "degree")
    found, refused = molecules(root, name, skip=True)
    for line, reason in refused:
        print(f"{name}.csv:{line} is left out: {reason}")
    return found


def on_cora(study: Study, root: Path) -> None:
    data, edges = cora_of(root)
    for seed in range(study.options.seeds):
        for kind in KINDS:
            for name, technique in SETTINGS.items():
                epochs = study.options.epochs
                key = {"set": "cora", "kind": kind, "technique": repr(technique), "seed": seed, "epochs": epochs}
                told = None if technique is None else dataclasses.replace(technique, edges="edges")
                compute = partial(train_nodes, kind, told, data, edges[kind], seed, epochs)
                run(study, "cora", kind, name, seed, key, compute)
    for kind in KINDS:
        show(study, "cora", kind, "accuracy %")


def on_graphs(study: Study, root: Path, names: Sequence[str]) -> None:
    for name in names:
        settings = FULL if study.options.full else SETS[name]
        metric, told = (auroc, "AUROC %") if name in ("BBBP", "clintox") else (accuracy, "accuracy %")
        graphs: list[Graph] = []
        for seed in range(study.options.graph_seeds):
            for setting in SMALL:
                technique = SETTINGS[setting]
                technique = technique and dataclasses.replace(technique, edges="edges", batch="batch")
                key = {"set": name, "technique": repr(technique), "seed": seed, **settings}
                graphs = graphs or graphs_of(name, root)
                compute = partial(train_graphs, graphs, technique, metric, seed, **settings)
                run(study, name, "GIN", setting, seed, key, compute)
        show(study, name, "GIN", told)


def run(
    study: Study,
    name: str,
    kind: str,
    setting: str,
    seed: int,
    key: Mapping[str, Any],
    compute: Callable[[], Trained],
) -> None:
    """One training, as a row of the results."""

    def trained() -> dict[str, float]:
        found = compute()
        return {"validation": found.validation, "test": found.test}

    row = study.row("degree quant", {**key, "recipe": RECIPE}, f"{name}, {kind}, {setting}, seed {seed}", trained)
    if row is not None:
        study.rows.append({"set": name, "kind": kind, "setting": setting, "seed": seed, **row})


def show(study: Study, name: str, kind: str, told: str) -> None:
    """A row by setting; differences are paired by seed."""
    rows = [row for row in study.rows if row["set"] == name and row["kind"] == kind]
    found = {setting: {row["seed"]: row["test"] for row in same} for (setting,), same in by(rows, "setting").items()}
    lines = []
    for setting, tests in found.items():
        bits = next((n for n in (8, 4) if f"INT{n}" in setting), 0)
        plain = found.get(f"QAT INT{bits}", {}) if bits and not setting.startswith("QAT") else {}
        gains = [tests[seed] - plain[seed] for seed in tests if seed in plain]
        lines.append([setting, str(len(tests)), spread(tests.values(), percent=True, digits=1), gain(gains)])
    title = f"{name}, {kind}: {told} on the test part, mean and standard deviation over seeds"
    table(title, ("setting", "seeds", told, "over QAT of the same bits"), lines)


def gain(values: Sequence[float]) -> str:
    """Mean of paired differences in points, and its standard error."""
    if len(values) < 2:
        return "-"
    return f"{100 * statistics.fmean(values):+.1f} (s.e. {100 * statistics.stdev(values) / len(values) ** 0.5:.1f})"


def on_error(study: Study, root: Path) -> None:
    """How far a sum over neighbours is from the float one, by in-degree; and what the operations would be."""
    data, edges = cora_of(root)
    errors: dict[str, list[list[float]]] = {}
    for setting in ("QAT INT4", "DQ INT4", "QAT INT8", "DQ INT8"):
        technique = SETTINGS[setting]
        assert technique is not None
        key = {"error": repr(technique), "epochs": study.options.epochs}

        def compute(technique: bs.DegreeQuant = technique) -> list[list[float]]:
            told = dataclasses.replace(technique, edges="edges")
            net = train_nodes("GIN", told, data, edges["GIN"], 0, study.options.epochs).net
            return error.by_degree(net, node_net("GIN", data["x"].shape[1], 7), (data["x"], edges["GIN"]))

        found = study.row("degree quant", {**key, "recipe": RECIPE}, f"error by degree, {setting}", compute)
        if found is not None:
            errors[setting] = found
    error.show(errors)
    for kind in KINDS:
        error.operations(kind, node_net(kind, data["x"].shape[1], 7), (data["x"], edges[kind]))


def cora_of(root: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """GIN takes the fused path: its messages are rows of its input, and the sums are the same."""
    data = {name: torch.from_numpy(array) for name, array in cora(root).items()}
    sparse = to_torch_csr_tensor(data["edge_index"].flip(0), size=(len(data["x"]),) * 2)
    return data, {"GCN": data["edge_index"], "GIN": sparse, "GAT": data["edge_index"]}


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "degree_quant",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(SHARES),
        seeds=10,
        full=f"{FULL_EPOCHS} epochs on Cora, 100 of GIN with 5 layers of 64 elsewhere, no limit of time: hours",
        store="degree_quant",
        more={
            "epochs": (int, None, f"of each training on Cora ({EPOCHS}; {FULL_EPOCHS} with --full)"),
            "graph-seeds": (int, 3, "of the sets of graphs (3)"),
        },
    )
    study.options.epochs = study.options.epochs or (FULL_EPOCHS if study.options.full else EPOCHS)
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    parts: Mapping[str, Callable[[], None]] = {
        "cora": partial(on_cora, study, root),
        "error": partial(on_error, study, root),
        "attachment": partial(on_graphs, study, root, ("attachment",)),
        "imdb": partial(on_graphs, study, root, ("imdb",)),
        "molecules": partial(on_graphs, study, root, ("BBBP", "clintox")),
    }
    for name in study.chosen:
        study.part(SHARES[name] / sum(SHARES[one] for one in study.chosen))
        parts[name]()
    study.finish()


if __name__ == "__main__":
    main()
