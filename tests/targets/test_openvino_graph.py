"""What OpenVINO's compiled graph says of sites, from nodes written down."""

from __future__ import annotations

from bitsmith.targets._openvino_graph import Node, Owners, products


def test_nodes_of_the_compiled_graph_are_given_to_sites_and_tensors() -> None:
    owners = Owners.of(
        {"conv": ["conv/Conv/WithoutBiases", "conv/Conv"], ":cat": [":cat/Concat"]}, ["conv", ":cat", "@x"]
    )

    def node(
        kind: str, *layers: str, outputs: tuple[str, ...] = ("u8",), precision: str = "f32", source: str = ""
    ) -> Node:
        return Node(layers[0] if layers else "", kind, layers, precision, "jit_f32", outputs, (source,))

    conv = node("Convolution", "conv/Conv/WithoutBiases", "Multiply.1", "conv/Conv", "conv/Quantize.u8")
    assert owners.sites(conv) == ["conv"]
    assert owners.sites(node("Concatenation", ":cat/Concat_original")) == [":cat"]
    back = node("Subgraph", ":cat/Concat/DequantizationConvert", ":cat/Concat")
    assert (owners.sites(back), owners.tensor(back, {})) == ([], ":cat")
    assert owners.tensor(node("Subgraph", "@x/Quantize.u8"), {}) == "@x"
    graph = {"c": conv}
    assert owners.tensor(node("Reorder", precision="u8", outputs=("f32",), source="c"), graph) == "conv"
    assert owners.tensor(node("Reorder", precision="u8", outputs=("u8",), source="c"), graph) == ""


def test_a_subgraph_that_only_dequantizes_multiplies_nothing() -> None:
    def node(name: str, kind: str, layers: tuple[str, ...], out: str, *sources: str) -> Node:
        return Node(name, kind, layers, out, "jit_avx2_f32", (out,), sources)

    dense = node("dense", "FullyConnected", ("0/MatMul_original",), "u8", "x", "w")
    back = node("back", "Subgraph", ("0/MatMul/DequantizationMultiply", "0/MatMul"), "f32", "dense", "c")
    constants = [node("w", "Const", ("w",), "i8"), node("c", "Const", ("c",), "f32")]
    assert products([*constants, dense, back]) == {}
    both = node("both", "Subgraph", ("0/MatMul", "0/MatMul/DequantizationMultiply"), "f32", "x", "w")
    assert products([*constants, both]) == {"both": frozenset({"0/MatMul"})}
