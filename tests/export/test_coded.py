"""Entropy and Huffman sizes against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitsmith as bs
from bitsmith.export.coded import word_lengths
from bitsmith.model.intercept import InterceptionError


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_huffman_code_is_a_prefix_code_near_the_entropy(counts: list[int]) -> None:
    lengths = word_lengths(counts)
    total = sum(counts)
    assert sum(2.0**-length for length in lengths) == pytest.approx(1.0)  # Kraft: complete
    mean = sum(n * length for n, length in zip(counts, lengths, strict=True)) / total
    entropy = -sum(n / total * math.log2(n / total) for n in counts)
    assert entropy - 1e-9 <= mean < entropy + 1
    assert all((a <= b) or (m <= n) for (a, m), (b, n) in itertools.permutations(zip(lengths, counts, strict=True), 2))


def test_sizes_of_a_plan() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9)),
        torch.randn(2, 64),
    )
    plan = bs.Plan({"0": bs.Palette(4, of=bs.Sparse(0.1)), "2": bs.Int(8, 8, of=bs.Sparse(0.5)), "4": bs.Float()})
    net = bs.apply(model, plan, [(x, None)])
    found = bs.coded_sizes(net, x)
    assert set(found) == {"0", "2", "4"}
    sites = bs.sites(model, x)
    for name, size in found.items():
        assert size.plain == plan[name].bits(sites[name])
    # nine tenths are zero: their entropy alone is 0.47 bits
    zero = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1)) * 4096
    assert zero < found["0"].entropy < zero + 0.1 * 4096 * 4
    table = 16 * (32 + 8)
    assert found["0"].entropy < found["0"].huffman - table < found["0"].entropy + 4096
    assert found["4"] == bs.CodedSize(64 * 9 * 32, 64 * 9 * 32, 64 * 9 * 32)
    assert found["2"].entropy < 8 * 4096
    with pytest.raises(InterceptionError):
        bs.coded_sizes(model, x)
