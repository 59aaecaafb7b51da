"""How small weights would be behind an entropy coder: a figure beside the file's bytes."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import call
from ..model.apply import additions_of, computer_of, materialised, plan_of
from ..model.keys import encode_key
from ..technique import Cell

_MANY = 4096
"""More different values than this are not coded: a code of single numbers gains nothing on them."""


@dataclass(frozen=True)
class CodedSize:
    """Storage of a site's weights, in bits. ``plain``: as the technique promises, what files hold. ``entropy``: the
    number of weights times Shannon's entropy of their values (1948, doi:10.1002/j.1538-7305.1948.tb01338.x), what no
    code of single weights goes below. ``huffman``: a Huffman code (1952, doi:10.1109/JRPROC.1952.273898) with its
    table, a value and the length of its word for each. Both are ``plain`` where weights have more than 4096 different
    values.
    """

    plain: float
    entropy: float
    huffman: float


def coded_sizes(net: nn.Module, example: Any) -> Mapping[str, CodedSize]:
    """For every site of an applied network's plan with a weight, what an entropy coder would make of it.

    Pruned, shared and quantized weights have few values of unequal frequency (Han et al. 2016, arXiv:1510.00149,
    section 4). No runtime here reads such files: the sizes are stated beside those of the file, never in their place.
    Scales and zero points are left out of ``entropy`` and ``huffman``. ``example``: inputs as in a loader's item.
    Raises ``InterceptionError`` for a network that carries no plan.
    """
    plan, sites = plan_of(net), {}
    replica = materialised(net, lambda module: call(module, example))
    cells, known = additions_of(replica).cells, computer_of(replica).record_sites
    for name, technique in plan.sites.items():
        site, cell = known[name], cells[encode_key(name)]
        if site.weight is None or not isinstance(cell, Cell):
            continue
        buffers = dict(cell.named_buffers(recurse=False))
        stored = next((buffers[key] for key in ("weight_q", "weight_q4", "weight_f") if key in buffers), None)
        plain = technique.bits(site)
        sites[name] = CodedSize(plain, plain, plain) if stored is None else _coded(stored, plain)
    return sites


def _coded(stored: torch.Tensor, plain: float) -> CodedSize:
    values, counts = torch.unique(stored, return_counts=True)
    if len(values) > _MANY:
        return CodedSize(plain, plain, plain)
    each = 32 if stored.is_floating_point() else 8
    frequencies = counts.tolist()
    total = sum(frequencies)
    entropy = -sum(n * math.log2(n / total) for n in frequencies)
    coded = sum(n * length for n, length in zip(frequencies, word_lengths(frequencies), strict=True))
    return CodedSize(plain, entropy, coded + len(values) * (each + 8))


def word_lengths(counts: Sequence[int]) -> list[int]:
    """Lengths of the words of a Huffman code, in bits, for symbols seen so often; a single symbol takes one bit.

    >>> word_lengths([5, 1, 1, 2])
    [1, 3, 3, 2]
    """
    if len(counts) == 1:
        return [1]
    order = itertools.count()
    heap = [(count, next(order), [symbol]) for symbol, count in enumerate(counts)]
    heapq.heapify(heap)
    lengths = [0] * len(counts)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        members = first[2] + second[2]
        for symbol in members:
            lengths[symbol] += 1
        heapq.heappush(heap, (first[0] + second[0], next(order), members))
    return lengths
