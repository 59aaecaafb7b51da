"""Sites, formats, ranges and the grammar of names."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.model.keys import decode_key, encode_key, tensor_key
from bitsmith.site import Format, Operand, Range, Record, Site, TensorInfo, UnknownSiteError, contains, inner_path

X = Operand("input", "@x", (2, 3), "float32")
W = Operand("weight", "a<1", (4, 3), "float32", constant=True, key="a.weight", parameters=("a.weight",))
INDEX = Operand("index", "@i", (2,), "int64")


def site(name: str, *operands: Operand, **options: object) -> Site:
    return Site(name, "linear", name, "integer", operands, (name,), ((2, 4),), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_levels(bits: int, signed: bool) -> None:
    low, high = Format(bits, signed=signed).levels
    assert high - low + 1 == 2**bits
    assert (low == 0) != signed


@pytest.mark.parametrize("bits", [0, 1, 9, 12, 17, 32])
def test_impossible_formats(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8, or 16"):
        Format(bits)


def test_impossible_ranges() -> None:
    with pytest.raises(ValueError, match="percentile"):
        Range("percentile", 50.0)
    with pytest.raises(ValueError, match="must be 'minmax'"):
        Range("max")  # type: ignore[arg-type]
    assert not Range().needs_histogram
    assert all(Range(m).needs_histogram for m in ("percentile", "mse", "entropy"))  # type: ignore[arg-type]


def test_weight_and_activations() -> None:
    one = site("a", X, W, INDEX)
    assert one.weight is W
    assert one.activations == (X,)
    assert one.parameter_bytes == 48
    assert site("b", X, INDEX).weight is None
    assert site("b", X).parameter_bytes == 0
    assert copy.deepcopy(one) is one


def test_unknown_names_offer_the_closest() -> None:
    record = Record({"layer1.0.conv1": site("layer1.0.conv1", X), "fc": site("fc", X)}, {})
    assert record.site("fc").name == "fc"
    with pytest.raises(UnknownSiteError, match=r"closest: layer1\.0\.conv1") as caught:
        record.site("layer1.0.conv")
    assert isinstance(caught.value, (KeyError, ValueError))
    assert "bitsmith.sites" in str(caught.value)
    with pytest.raises(UnknownSiteError, match="the model has 2 sites"):
        record.site("@@@@")


def test_edges_start_at_the_head_of_an_epilogue() -> None:
    first = site("a", X, W, epilogue=("a.relu",), tail="a.relu")
    relu = Site(
        "a.relu", "relu", "a.relu", "float", (Operand("input", "a", (2, 4), "float32"),), ("a.relu",), ((2, 4),)
    )
    second = site("b", Operand("input", "a.relu", (2, 4), "float32"), W)
    infos = {
        name: TensorInfo(name, (2, 4), "float32", producer)
        for name, producer in (("@x", ""), ("a", "a"), ("a.relu", "a.relu"))
    }
    record = Record({s.name: s for s in (first, relu, second)}, infos)
    assert [(e.producer, e.consumer, e.tensor) for e in record.edges()] == [("@x", "a", "@x"), ("a", "b", "a.relu")]


def test_edges_go_to_the_inside_of_what_is_seen_inside() -> None:
    outer = Site("m", "lstm", "m", "composite", (X,), ("m",), ((2, 4),))
    inner = site("m.lstm:linear", X, W, parent="m")
    record = Record({"m": outer, "m.lstm:linear": inner}, {"@x": TensorInfo("@x", (2, 3), "float32", "")})
    assert [e.consumer for e in record.edges()] == ["m.lstm:linear"]


def test_containment() -> None:
    assert contains("block", "block.conv")
    assert contains("block", "block:add.1")
    assert contains("block:scaled_dot_product_attention", "block.scaled_dot_product_attention:matmul")
    assert contains(":scaled_dot_product_attention", ".scaled_dot_product_attention:matmul")
    assert not contains("block", "block")
    assert not contains("block", "blocks.conv")
    assert not contains("block:add", "block:add.1")
    assert inner_path("a.b:add.1") == "a.b.add.1"


@given(st.text(st.sampled_from("ab01./~:_|#@<"), min_size=1, max_size=20))
def test_keys_are_reversible_and_hold_no_dot(name: str) -> None:
    assert "." not in encode_key(name)
    assert decode_key(encode_key(name)) == name


def test_quantizers_of_different_formats_have_different_keys() -> None:
    formats = [
        Format(8),
        Format(4),
        Format(8, signed=True),
        Format(8, signed=True, symmetric=True),
        Format(8, range=Range("mse")),
        Format(8, range=Range("percentile", 99.9)),
        Format(8, range=Range("percentile", 99.0)),
    ]
    keys = [tensor_key("a.b:add", fmt) for fmt in formats]
    assert len(set(keys)) == len(formats)
    assert not any("." in key for key in keys)
