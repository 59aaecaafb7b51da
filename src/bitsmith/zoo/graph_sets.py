"""Sets of small graphs, each with a label: from files, drawn at random, and molecules from their SMILES."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import present

FILES = ("IMDBBINARY", "MUTAG", "PROTEINS")


@dataclass(frozen=True)
class Graph:
    """``x`` (nodes, features) float32; ``edge_index`` (2, edges) int64, both directions of every edge; ``y``: a class,
    int64 (), or one 0 or 1 by task, float32 (tasks,)."""

    x: Tensor
    edge_index: Tensor
    y: Tensor


class MoleculeError(ValueError):
    """Rows of a file of molecules that could not be read. ``rows``: (line in the file, reason) of each."""

    def __init__(self, path: Path, rows: Sequence[tuple[int, str]]) -> None:
        self.rows = tuple(rows)
        told = "".join(f"\n  line {line}: {reason}" for line, reason in rows)
        super().__init__(
            f"{path}: {len(rows)} row{'s' if len(rows) != 1 else ''} cannot be read; mend them, or leave them out with "
            f"skip=True:{told}"
        )


def collate(graphs: Iterable[Graph]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """``((x, edge_index, batch), y)`` of several graphs side by side: an item of a loader. ``batch``: the graph of each
    node, int64; ``y``: one row by graph. Raises ``ValueError`` for no graph.

    >>> one = Graph(torch.zeros(2, 3), torch.tensor([[0], [1]]), torch.tensor(1))
    >>> (x, edges, batch), y = collate([one, one])
    >>> edges.tolist(), batch.tolist(), y.tolist()
    ([[0, 2], [1, 3]], [0, 0, 1, 1], [1, 1])
    """
    graphs = list(graphs)
    if not graphs:
        raise ValueError("collate: no graph was given")
    sizes = torch.tensor([len(graph.x) for graph in graphs])
    starts = sizes.cumsum(0) - sizes
    edges = torch.cat([graph.edge_index + start for graph, start in zip(graphs, starts, strict=True)], 1)
    batch = torch.arange(len(graphs)).repeat_interleave(sizes)
    return (torch.cat([graph.x for graph in graphs]), edges, batch), torch.stack([graph.y for graph in graphs])


def graph_file(root: str | Path, name: str, features: str = "tag", most: int = 64) -> list[Graph]:
    """The graphs of ``graphs/<name>.txt`` under ``root``: MUTAG, PROTEINS or IMDBBINARY, in the order of the file.

    ``features``: ``tag`` (one-hot of the nodes' tags) or ``degree`` (one-hot of the degree; ``most`` and above count
    as one), for graphs without tags as IMDB-BINARY (Xu et al. 2018, arXiv:1810.00826, section 7). Classes count from
    0, in the order of the labels. Raises ``FileNotFoundError``, ``ValueError`` with the line that is broken.
    """
    if features not in ("tag", "degree"):
        raise ValueError(f"graph_file(features={features!r}): must be 'tag' or 'degree'")
    path = present(root, "graphs", f"{name}.txt")
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    found: list[tuple[int, list[int], list[tuple[int, int]]]] = []
    at = 0
    try:
        count, at = int(rows[0][0]), 1
        for _ in range(count):
            nodes, label = map(int, rows[at])
            tags, edges = [], []
            for node in range(nodes):
                at += 1
                tag, degree, *neighbours = map(int, rows[at])
                if degree != len(neighbours) or not all(0 <= other < nodes for other in neighbours):
                    raise ValueError("neighbours that are not there")
                tags.append(tag)
                edges += [(other, node) for other in neighbours]
            found.append((label, tags, edges))
            at += 1
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}:{at + 1}: not the text of a graph ({error})") from None
    labels = {label: index for index, label in enumerate(sorted({label for label, _, _ in found}))}
    kinds = {tag: index for index, tag in enumerate(sorted({tag for _, tags, _ in found for tag in tags}))}
    graphs = []
    for label, tags, edges in found:
        index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T.contiguous()
        if features == "tag":
            column, width = torch.tensor([kinds[tag] for tag in tags]), len(kinds)
        else:
            column, width = torch.bincount(index[1], minlength=len(tags)).clamp(max=most), most + 1
        x = torch.nn.functional.one_hot(column, width).float()
        graphs.append(Graph(x, index, torch.tensor(labels[label])))
    return graphs


def attachment_graphs(
    count: int, nodes: tuple[int, int] = (100, 300), edges: int = 2, preference: float = 0.5, seed: int = 0
) -> list[Graph]:
    """Grown graphs of two classes that differ in how skewed their degrees are, half of each.

    Every new node ties ``edges`` edges to nodes that are there: in class 1 always in proportion to their degree
    (Barabasi and Albert 1999, Science 286), in class 0 with probability ``preference`` so and otherwise to any node
    alike. Both have equally many edges. The size is drawn from ``nodes`` (least, greatest). The only feature is 1.

    >>> [len(graph.x) for graph in attachment_graphs(2, (5, 5))]
    [5, 5]
    """
    if not 1 <= edges < nodes[0] <= nodes[1] or not 0.0 <= preference <= 1.0:
        raise ValueError(
            f"attachment_graphs(nodes={nodes}, edges={edges}, preference={preference}): needs edges < least <= "
            "greatest and a preference from 0 to 1"
        )
    rng = np.random.default_rng(seed)
    graphs = []
    for index in range(count):
        size, label = int(rng.integers(nodes[0], nodes[1] + 1)), index % 2
        ends: list[int] = list(range(edges + 1))  # a node as often as it has edges
        pairs: list[tuple[int, int]] = [(0, node) for node in range(1, edges + 1)]
        ends += [0] * (edges - 1)
        for node in range(edges + 1, size):
            chosen: set[int] = set()
            while len(chosen) < edges:
                skewed = label == 1 or rng.random() < preference
                chosen.add(ends[int(rng.integers(len(ends)))] if skewed else int(rng.integers(node)))
            for other in sorted(chosen):
                pairs.append((other, node))
                ends += [other, node]
        one = torch.tensor(pairs).T
        graphs.append(Graph(torch.ones(size, 1), torch.cat((one, one.flip(0)), 1), torch.tensor(label)))
    return graphs


_ATOMS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P", "Na", "Si", "B")
_MOLECULES = {"BBBP": ("BBBP",), "clintox": ("FDA_APPROVED", "CT_TOX")}


def molecules(root: str | Path, name: str, skip: bool = False) -> tuple[list[Graph], tuple[tuple[int, str], ...]]:
    """The molecules of ``moleculenet/<name>.csv`` under ``root`` (BBBP or clintox; Wu et al. 2018, MoleculeNet) that
    RDKit reads, and (line, reason) of those that it does not.

    Features as of :func:`molecule`; ``y``: 0 or 1 by task (BBBP has one, ClinTox two: approved, toxic). Raises
    :class:`MoleculeError` for rows that do not parse unless ``skip``, ``FileNotFoundError``, ``ModuleNotFoundError``
    without RDKit.
    """
    if name not in _MOLECULES:
        raise ValueError(f"molecules({name!r}): must be one of {', '.join(_MOLECULES)}")
    path = present(root, "moleculenet", f"{name}.csv")
    graphs: list[Graph] = []
    refused: list[tuple[int, str]] = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"smiles", *_MOLECULES[name]} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: the columns {', '.join(sorted(missing))} are missing")
        for row in reader:
            try:
                y = torch.tensor([float(row[task]) for task in _MOLECULES[name]])
                graphs.append(Graph(*molecule(row["smiles"]), y))
            except (ValueError, TypeError) as error:
                refused.append((reader.line_num, str(error)))
    if refused and not skip:
        raise MoleculeError(path, refused)
    return graphs, tuple(refused)


def molecule(smiles: str) -> tuple[Tensor, Tensor]:
    """``(x, edge_index)`` of a molecule: its heavy atoms and bonds, both directions.

    Features of an atom, 32: one-hot of its element (12 and others), of its bonds (0 to 6, and more), of its hydrogens
    (0 to 4, and more) and of its charge (below, at and above 0); whether it is in a ring; whether it is aromatic.
    Raises ``ValueError`` with the reason and the SMILES where RDKit cannot read it.
    """
    try:
        from rdkit import Chem, rdBase
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'molecules are read with RDKit, which is not installed: pip install "bitsmith[molecules]"'
        ) from None
    with rdBase.BlockLogs():
        found = Chem.MolFromSmiles(smiles, sanitize=False)
        if found is None:
            raise ValueError(f"{smiles!r} is not SMILES")
        try:
            Chem.SanitizeMol(found)
        except ValueError as error:
            raise ValueError(f"{smiles!r}: {error}") from None
    if not found.GetNumAtoms():
        raise ValueError(f"{smiles!r} has no atom")
    x = torch.stack([_atom(atom) for atom in found.GetAtoms()])
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in found.GetBonds()]
    one = torch.tensor(bonds, dtype=torch.int64).reshape(-1, 2).T
    return x, torch.cat((one, one.flip(0)), 1)


def _atom(atom: Any) -> Tensor:
    row = torch.zeros(32)
    symbol = atom.GetSymbol()
    row[_ATOMS.index(symbol) if symbol in _ATOMS else 12] = 1
    row[13 + min(atom.GetDegree(), 7)] = 1
    row[21 + min(atom.GetTotalNumHs(), 5)] = 1
    charge = atom.GetFormalCharge()
    row[27 + (charge > 0) - (charge < 0) + 1] = 1
    row[30], row[31] = float(atom.IsInRing()), float(atom.GetIsAromatic())
    return row
