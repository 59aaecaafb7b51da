"""Sets of graphs: files of another form, growth by its rule, molecules row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitsmith.zoo.data import data_root
from bitsmith.zoo.graph_sets import (
    Graph,
    MoleculeError,
    attachment_graphs,
    collate,
    graph_file,
    molecule,
    molecules,
)

TWO = "2\n3 5\n7 2 1 2\n9 1 0\n7 1 0\n1 -1\n8 0\n"


def written(folder, text: str, name: str = "graphs/MUTAG.txt"):
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return folder


def test_a_file_by_tags_and_by_degrees(tmp_path) -> None:
    first, second = graph_file(written(tmp_path, TWO), "MUTAG")
    assert first.x.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert sorted(map(tuple, first.edge_index.T.tolist())) == [(0, 1), (0, 2), (1, 0), (2, 0)]
    assert (int(first.y), int(second.y)) == (1, 0)
    assert second.edge_index.shape == (2, 0)  # a node without edges
    by_degree = graph_file(tmp_path, "MUTAG", "degree", most=1)
    assert by_degree[0].x.tolist() == [[0, 1], [0, 1], [0, 1]]
    assert by_degree[1].x.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("text", "line"),
    [(TWO.replace("9 1 0", "9 2 0"), 4), (TWO.replace("7 2 1 2", "7 2 1 8"), 3), (TWO[:-5], 7), ("x\n", 1)],
)
def test_a_broken_file_names_the_line(tmp_path, text: str, line: int) -> None:
    with pytest.raises(ValueError, match=rf"MUTAG.txt:{line}: not the text of a graph"):
        graph_file(written(tmp_path, text), "MUTAG")


def test_what_is_missing_or_unknown(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="BITSMITH_DATA"):
        graph_file(tmp_path, "MUTAG")
    with pytest.raises(ValueError, match="features='size'"):
        graph_file(tmp_path, "MUTAG", "size")
    with pytest.raises(ValueError, match="BBBP, clintox"):
        molecules(tmp_path, "QM9")
    with pytest.raises(ValueError, match="no graph"):
        collate([])


def test_grown_graphs_have_equal_numbers_of_edges_and_unequal_hubs() -> None:
    graphs = attachment_graphs(60, (80, 80), 2, 0.0, seed=1)
    tops = {0: [], 1: []}
    for graph in graphs:
        assert graph.edge_index.shape == (2, 2 * (2 + 2 * (80 - 3)))
        pairs = set(map(tuple, graph.edge_index.T.tolist()))
        assert len(pairs) == graph.edge_index.shape[1]  # no edge twice
        assert {(b, a) for a, b in pairs} == pairs
        assert all(a != b for a, b in pairs)
        tops[int(graph.y)].append(int(torch.bincount(graph.edge_index[1]).max()))
    assert len(tops[0]) == len(tops[1]) == 30
    assert np.median(tops[1]) > 1.5 * np.median(tops[0])
    again = attachment_graphs(60, (80, 80), 2, 0.0, seed=1)
    assert all(torch.equal(a.edge_index, b.edge_index) for a, b in zip(graphs, again, strict=True))


@pytest.mark.parametrize("settings", [{"edges": 0}, {"nodes": (2, 5)}, {"nodes": (9, 5)}, {"preference": 2.0}])
def test_graphs_that_cannot_grow(settings) -> None:
    with pytest.raises(ValueError, match="attachment_graphs"):
        attachment_graphs(2, **{"nodes": (5, 9), **settings})


def test_graphs_side_by_side() -> None:
    graphs = attachment_graphs(5, (6, 12), seed=3)
    (x, edges, batch), y = collate(graphs)
    assert len(x) == len(batch) == sum(len(graph.x) for graph in graphs)
    assert y.tolist() == [0, 1, 0, 1, 0]
    for number, graph in enumerate(graphs):
        own = batch[edges[0]] == number
        start = int((batch < number).sum())
        assert torch.equal(edges[:, own] - start, graph.edge_index)
    assert isinstance(graphs[0], Graph)


def test_a_molecule() -> None:
    pytest.importorskip("rdkit", reason='needs RDKit: pip install "bitsmith[molecules]"')
    x, edges = molecule("C[N+](C)(C)c1ccccc1")
    assert x.shape == (10, 32)
    assert edges.shape == (2, 20)
    assert x[:, :13].argmax(1).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert x[:, 13:21].argmax(1).tolist() == torch.bincount(edges[1]).tolist()
    assert x[:, 27:30].argmax(1).tolist() == [1, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert x[:, 31].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert torch.equal(x.sum(1), 4 + x[:, 30] + x[:, 31])
    assert molecule("[Na+]")[1].shape == (2, 0)  # no bond


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [("C(C", "not SMILES"), ("FC(F)(F)(F)F", "valence"), ("c1ccc1x", "not SMILES"), ("", "no atom")],
)
def test_what_is_no_molecule_says_why(smiles: str, reason: str) -> None:
    pytest.importorskip("rdkit", reason='needs RDKit: pip install "bitsmith[molecules]"')
    with pytest.raises(ValueError, match=reason):
        molecule(smiles)


def test_rows_that_do_not_parse_are_named(tmp_path) -> None:
    pytest.importorskip("rdkit", reason='needs RDKit: pip install "bitsmith[molecules]"')
    rows = "smiles,FDA_APPROVED,CT_TOX\nCCO,1,0\nC(C,1,0\nCC,yes,0\nCN,0,1\n"
    root = written(tmp_path, rows, "moleculenet/clintox.csv")
    with pytest.raises(MoleculeError, match=r"2 rows cannot be read.*\n  line 3: 'C\(C' is not SMILES\n  line 4: "):
        molecules(root, "clintox")
    graphs, refused = molecules(root, "clintox", skip=True)
    assert [graph.y.tolist() for graph in graphs] == [[1, 0], [0, 1]]
    assert [line for line, _ in refused] == [3, 4]
    with pytest.raises(ValueError, match="columns BBBP"):
        molecules(written(tmp_path / "other", rows, "moleculenet/BBBP.csv"), "BBBP")


@pytest.mark.data
def test_the_published_sets() -> None:
    root = data_root()
    assert root is not None
    for name, count, positive in (("MUTAG", 188, 125), ("IMDBBINARY", 1000, 500)):
        graphs = graph_file(root, name, "tag" if name == "MUTAG" else "degree")
        assert len(graphs) == count
        assert sum(int(graph.y) for graph in graphs) in (positive, count - positive)


@pytest.mark.data
def test_the_published_molecules() -> None:
    pytest.importorskip("rdkit", reason='needs RDKit: pip install "bitsmith[molecules]"')
    root = data_root()
    assert root is not None
    for name in ("BBBP", "clintox"):
        graphs, refused = molecules(root, name, skip=True)
        assert len(graphs) > 1400
        assert len(refused) < 20
        assert all(reason for _, reason in refused)
