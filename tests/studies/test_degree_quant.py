"""The study of Degree-Quant, whole, on small graphs and few epochs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls torch.jit.script when it is imported
    pytest.importorskip("torch_geometric", reason='needs PyTorch Geometric: pip install "bitsmith[graphs]"')

from bitsmith.zoo.graph_sets import Graph, attachment_graphs
from repository import load

load("benchmarks.harness")
command, guided = load("studies._command"), load("studies._guided")
networks, error = load("studies.degree_quant.networks"), load("studies.degree_quant.error")
study = load("studies.degree_quant.__main__")

pytestmark = pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*jit.*:DeprecationWarning")


def small_cora(root):
    draw = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 40, (2, 150), generator=draw)
    edges = edges[:, edges[0] != edges[1]].unique(dim=1)
    data = {
        "x": torch.rand(40, 12, generator=draw),
        "y": torch.arange(40) % 7,
        "edge_index": edges,
        "train": torch.arange(20),
        "val": torch.arange(20, 30),
        "test": torch.arange(30, 40),
    }
    sparse = to_sparse(edges, 40)
    return data, {"GCN": edges, "GIN": sparse, "GAT": edges}


def to_sparse(edges, nodes):
    from torch_geometric.utils import to_torch_csr_tensor

    return to_torch_csr_tensor(edges.flip(0), size=(nodes, nodes))


def test_all_parts_and_again_from_the_store(monkeypatch, tmp_path, capsys) -> None:
    for module in (command, guided):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "data_root", lambda: tmp_path)
    monkeypatch.setattr(study, "cora_of", small_cora)
    monkeypatch.setattr(error, "PLOT", tmp_path / "error.svg")
    small = {name: {"epochs": 1, "hidden": 4, "layers": 1} for name in study.SETS}
    monkeypatch.setattr(study, "SETS", small)

    def graphs_of(name, root):
        graphs = attachment_graphs(30, (8, 12))
        return (
            graphs if name in ("attachment", "imdb") else [Graph(g.x, g.edge_index, g.y[None].float()) for g in graphs]
        )

    monkeypatch.setattr(study, "graphs_of", graphs_of)
    arguments = ["--seeds", "2", "--graph-seeds", "2", "--epochs", "2"]
    study.main(arguments)
    first = json.loads((tmp_path / "degree_quant.json").read_text())
    assert not first["left_out"]
    assert len(first["rows"]) == 2 * (3 * len(networks.SETTINGS) + 4 * len(study.SMALL))
    assert all(0 <= row["test"] <= 1 for row in first["rows"])
    assert (tmp_path / "error.svg").exists()
    told = capsys.readouterr().out
    assert "DQ INT4, no percentile" in told
    assert "(modelled)" in told
    study.main(arguments)
    again = json.loads((tmp_path / "degree_quant.json").read_text())
    assert again["rows"] == first["rows"]
    assert " s\n  cora" not in capsys.readouterr().out


def test_a_training_is_repeatable_and_leaves_the_generator() -> None:
    data, edges = small_cora(None)
    before = torch.get_rng_state()
    technique = networks.dq(4, edges="edges")
    found = [networks.train_nodes("GCN", technique, data, edges["GCN"], 3, 4).test for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_area_under_the_curve() -> None:
    out = torch.tensor([[0.1, 1.0], [0.4, 1.0], [0.35, 1.0], [0.8, 1.0]])
    assert networks.auroc(out, torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]])) == (0.75 + 0.5) / 2
    assert networks.auroc(out, torch.ones(4, 2)) == 0.5  # nothing to compare
