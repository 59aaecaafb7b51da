from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitsmith.export.names import Origin, parse_scopes, site_names
from bitsmith.model.keys import encode_key

NAMES = st.from_regex(r"[a-z0-9]+(\.[a-z0-9]+){0,3}(:[a-z]+(\.[1-9])?)?", fullmatch=True)


@given(NAMES)
def test_the_site_of_a_cell_is_read_back(name: str) -> None:
    scopes = ["", "outer", f"_bitsmith.cells.{encode_key(name)}", "conv2d"]
    assert parse_scopes(scopes).site == name
    assert parse_scopes(repr(scopes)) == parse_scopes(scopes)


@given(NAMES, st.sampled_from(["u8", "i8s", "u8-percentile99_9"]))
def test_a_quantizer_inside_a_cell_is_its_tensors(name: str, kind: str) -> None:
    scopes = ["", "_bitsmith.cells.reader", f"_bitsmith.tensors.{encode_key(name)}|{kind}", "quantize"]
    assert parse_scopes(scopes) == Origin(tensor=name, format=kind)


def test_the_innermost_cell_wins_and_its_submodules_are_its_own() -> None:
    scopes = ["", "net._bitsmith.cells.attn", "net._bitsmith.cells.attn:linear.inner", "linear"]
    assert parse_scopes(scopes).site == "attn:linear"


def test_what_is_no_list_has_no_origin() -> None:
    assert parse_scopes("not [ a list") == Origin()
    assert parse_scopes("") == Origin()


def test_sites_in_order_without_composites_that_are_seen_inside() -> None:
    net = nn.Module()
    net._bitsmith = nn.Module()
    net._bitsmith.cells = nn.ModuleDict(
        {name: nn.Sequential(nn.ReLU()) for name in ("b", "attn", "attn:linear", "a/0")}
    )
    assert site_names(net) == ["b", "attn:linear", "a.0"]
