"""In-degrees, their distribution by graph, and the order of messages, against loops over nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.numerics.degrees import Messages, degree_quantiles, in_degrees, messages_of, with_loops


@st.composite
def graphs(draw):
    nodes = draw(st.integers(1, 9))
    pairs = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=25))
    return nodes, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_in_degrees_count_what_arrives(graph) -> None:
    nodes, edges = graph
    messages, found = messages_of(edges, nodes)
    assert found == nodes
    assert in_degrees(messages, nodes).tolist() == [edges[1].tolist().count(node) for node in range(nodes)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_quantiles_are_the_empirical_distribution_of_each_graph(pairs) -> None:
    batch, degree = (torch.tensor(column) for column in zip(*pairs, strict=True))
    got = degree_quantiles(degree, batch).double().numpy()
    for node, (graph, own) in enumerate(pairs):
        mates = [other for number, other in pairs if number == graph]
        np.testing.assert_allclose(got[node], sum(other <= own for other in mates) / len(mates), rtol=1e-6)


def test_one_graph_needs_no_batch() -> None:
    degree = torch.tensor([3, 0, 3, 1])
    assert torch.equal(degree_quantiles(degree), degree_quantiles(degree, torch.zeros(4, dtype=torch.int64)))
    assert degree_quantiles(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@given(graphs())
@settings(max_examples=30, deadline=None)
def test_a_sparse_matrix_has_the_same_messages(graph) -> None:
    nodes, edges = graph
    edges = edges.unique(dim=1)
    matrix = torch.sparse_coo_tensor(
        edges.flip(0), torch.ones(edges.shape[1]), (nodes, nodes), check_invariants=False
    ).coalesce()
    for sparse in (matrix, matrix.to_sparse_csr()):
        (source, target), found = messages_of(sparse)
        assert found == nodes
        # in the order of the values
        assert torch.equal(source, sparse.to_sparse_coo().coalesce().indices()[1])
        assert sorted(zip(source.tolist(), target.tolist(), strict=True)) == sorted(map(tuple, edges.T.tolist()))


def test_loops_come_last_or_in_their_place() -> None:
    messages = Messages(torch.tensor([2, 1, 0]), torch.tensor([0, 1, 2]))
    assert [ends.tolist() for ends in with_loops(messages, 3)] == [[2, 0, 0, 1, 2], [0, 2, 0, 1, 2]]
    assert [ends.tolist() for ends in with_loops(messages, 3, True)] == [[0, 2, 1, 0, 2], [0, 0, 1, 2, 2]]


@pytest.mark.parametrize(
    ("edges", "nodes", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), 5, r"shape \(2, edges\)"),
        (torch.zeros(2, 4), 5, "must be integers"),
        (torch.tensor([[0], [7]]), 5, "from 0 to 7, and there are 5"),
        (torch.tensor([[0], [1]]), None, "give nodes="),
        (torch.eye(3)[:2].to_sparse_coo(), None, "must be square"),
    ],
)
def test_edges_of_another_form_are_errors(edges, nodes, message) -> None:
    with pytest.raises(ValueError, match=message):
        messages_of(edges, nodes)
