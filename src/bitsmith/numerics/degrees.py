"""In-degrees of a graph's nodes, where they stand among the others, and which node sends which message.

Edges are integers (2, E), from row 0 to row 1, or a sparse matrix (N, N) whose row i holds what node i receives (the
transposed adjacency matrix that fused message passing takes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Messages(NamedTuple):
    """Who sends and who receives: int64 (E,) each."""

    source: Tensor
    target: Tensor


def messages_of(edges: Tensor, nodes: int | None = None) -> tuple[Messages, int]:
    """The messages along ``edges``, in their order, and the number of nodes.

    ``nodes``: how many there are; None only for a sparse matrix. Raises ``ValueError`` for edges of another form, or
    that name a node which is not there.
    """
    if edges.layout != torch.strided:
        if edges.dim() != 2 or edges.shape[0] != edges.shape[1]:
            raise ValueError(f"edges as a sparse matrix must be square (nodes, nodes), got {tuple(edges.shape)}")
        # the conversion keeps rows in order, and columns inside a row: the order of the values
        indices = edges.detach().to_sparse_coo().coalesce().indices()  # type: ignore[no-untyped-call]
        return Messages(indices[1], indices[0]), edges.shape[0]
    if edges.dim() != 2 or edges.shape[0] != 2 or edges.is_floating_point() or edges.dtype == torch.bool:
        raise ValueError(
            f"edges must be integers of shape (2, edges) or a sparse matrix (nodes, nodes), got {edges.dtype} of shape "
            f"{tuple(edges.shape)}"
        )
    if nodes is None:
        raise ValueError("messages_of: edges as (2, edges) do not tell how many nodes there are; give nodes=")
    edges = edges.detach().to(torch.int64)
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < nodes:
        raise ValueError(f"edges go from {int(edges.min())} to {int(edges.max())}, and there are {nodes} nodes")
    return Messages(edges[0], edges[1]), nodes


def in_degrees(messages: Messages, nodes: int) -> Tensor:
    """How many messages each node receives: int64 (N,), 0 for a node without edges.

    >>> in_degrees(Messages(torch.tensor([0, 1]), torch.tensor([2, 2])), 4)
    tensor([0, 0, 2, 0])
    """
    return torch.bincount(messages.target, minlength=nodes)


def degree_quantiles(degree: Tensor, batch: Tensor | None = None) -> Tensor:
    """F(degree): the part of the nodes of the same graph whose degree is no greater, float32 (N,), in (0, 1].

    ``degree``: integers (N,). ``batch``: the graph of each node, integers (N,); None: one graph. Equal degrees of one
    graph get equal values.

    >>> degree_quantiles(torch.tensor([1, 5, 1, 2]))
    tensor([0.5000, 1.0000, 0.5000, 0.7500])
    """
    if not degree.numel():
        return torch.zeros(0, device=degree.device)
    batch = torch.zeros_like(degree) if batch is None else batch.to(torch.int64)
    width = int(degree.max()) + 1
    kinds, kind, count = torch.unique(batch * width + degree, return_inverse=True, return_counts=True)
    graph = kinds // width
    size = torch.bincount(batch)
    before = size.cumsum(0) - size
    share: Tensor = (count.cumsum(0) - before[graph]).double() / size[graph]
    return share[kind].float()


def with_loops(messages: Messages, nodes: int, by_target: bool = False) -> Messages:
    """The messages of layers that let each node hear itself: self-loops taken out, one per node put behind.

    ``by_target``: sorted by target, then source, as they leave a sparse matrix.
    """
    others = messages.source != messages.target
    every = torch.arange(nodes, device=messages.source.device)
    source, target = (torch.cat((ends[others], every)) for ends in messages)
    order = torch.argsort(target * nodes + source) if by_target else slice(None)
    return Messages(source[order], target[order])
