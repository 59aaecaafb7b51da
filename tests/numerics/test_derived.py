from __future__ import annotations

import copy

import torch

from bitsmith.numerics.derived import Derived


def test_it_is_computed_again_only_where_a_source_changed() -> None:
    kept: Derived[torch.Tensor] = Derived()
    source, calls = torch.ones(3), []

    def compute() -> torch.Tensor:
        calls.append(1)
        return source * 2

    with torch.no_grad():
        first = kept.of([source], compute)
        assert kept.of([source], compute) is first
        source.add_(1)
        assert kept.of([source], compute).tolist() == [4, 4, 4]
        kept.of([source.clone()], compute)  # equal, but another tensor
        kept.of([source, source], compute)
        assert len(calls) == 4
        kept.clear()
        assert kept.value is None


def test_nothing_is_kept_with_gradients_or_under_inference_mode() -> None:
    kept: Derived[torch.Tensor] = Derived()
    source = torch.ones(3)
    kept.of([source], lambda: source * 2)
    assert kept.value is None
    with torch.inference_mode():
        inside = torch.ones(3)
        kept.of([inside], lambda: inside * 2)
    assert kept.value is None


def test_a_copy_starts_empty() -> None:
    kept: Derived[torch.Tensor] = Derived()
    source = torch.ones(3)
    with torch.no_grad():
        kept.of([source], lambda: source * 2)
    assert copy.deepcopy(kept).value is None
    assert kept.value is not None
