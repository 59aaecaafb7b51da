"""The benchmark of training steps: what it trains, counts and judges, on a small network."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import bitsmith as bs
import smallnet
from repository import load

harness, qat_peers = load("benchmarks.harness"), load("benchmarks.qat_peers")
training = load("benchmarks.training")

OURS = ("float", "bitsmith", "bitsmith, layers")
PEERS = ("brevitas", "torchao", "torchao frozen")


def small() -> nn.Module:
    model = smallnet.Small()
    model.load_state_dict(smallnet.small().state_dict())
    return model.eval()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    threads = torch.get_num_threads()
    monkeypatch.setattr(training, "network", lambda root: small())
    monkeypatch.setattr(training, "batches", lambda root, count=4: smallnet.batches(count, seed=5))
    monkeypatch.setattr(training, "STEPS", 6)
    monkeypatch.setattr(training, "TRAINERS", {name: qat_peers.TRAINERS[name] for name in OURS})
    monkeypatch.setattr(harness.Benchmark, "data", lambda self: tmp_path)
    made = harness.Benchmark("training", training.PARTS, default_threads=1)
    made.start([])
    torch.set_num_threads(threads)
    return made


def test_a_step_trains_and_counts_what_is_quantized(bench: Any, capsys: Any) -> None:
    training.step(bench)
    rows = {row["name"]: row for row in bench.rows}
    assert list(rows) == list(OURS)
    assert [rows[name]["mac_share"] for name in OURS] == [0.0, 1.0, 1.0]
    assert all(row["ms"] > 0 and row["loss_last"] < 3 for row in rows.values())
    assert not bench.misses
    assert not bench.verdicts  # nothing to be held against
    assert "MACs in int8" in capsys.readouterr().out


def test_a_peer_that_is_faster_is_judged_and_one_that_is_absent_missed(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = qat_peers.Trainer("stand-in", "torch", "ours under another name", qat_peers.layers, True)
    absent = qat_peers.Trainer("absent", "no-such-package", "", qat_peers.layers, True)
    chosen = {**training.TRAINERS, "stand-in": stand_in, "absent": absent}
    monkeypatch.setattr(training, "TRAINERS", chosen)
    training.step(bench)
    speed, loss = bench.verdicts
    assert speed.what == "step / fastest peer (stand-in)"
    assert speed.figure > 0
    assert loss.passed
    (miss,) = bench.misses
    assert miss.startswith("absent is not installed")


def test_a_peer_that_quantizes_too_little_is_no_comparison(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def head_only(model: nn.Module, batches: Any, w: int = 8, a: int = 8) -> nn.Module:
        return bs.apply(model, bs.Plan({"head": bs.Int(8, 8)}), [(x, None) for x in batches]).train()

    lazy = qat_peers.Trainer("lazy", "torch", "", head_only, True)
    monkeypatch.setattr(training, "TRAINERS", {**training.TRAINERS, "lazy": lazy})
    training.step(bench)
    assert [miss for miss in bench.misses if miss.startswith("lazy quantizes only")]


def test_saved_memory_counts_each_storage_once() -> None:
    x = torch.randn(2**18, requires_grad=True)

    def loop() -> float:
        y = x.exp()  # saves its result, a MiB
        z = y[:10].sin() * y.view(512, 512)[0, :10]  # views of it, and two small ones
        loss = z.sum()
        loss.backward()
        return float(loss.detach())

    assert training.saved_mib(loop) == pytest.approx(1, abs=0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_child_is_what_steps_add(bench: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "data_root", lambda: "here")
    threads = torch.get_num_threads()
    training.memory_child("bitsmith", threads, 1)
    added, saved = map(float, capsys.readouterr().out.split())
    assert added >= 0
    assert saved > 0.1


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.filterwarnings("ignore")
def test_peers_train_with_everything_on_a_grid(name: str) -> None:
    pytest.importorskip("brevitas" if name == "brevitas" else "torchao")
    data = smallnet.batches(6)
    for w, a in ((8, 8), (4, 4)):
        net = qat_peers.TRAINERS[name].build(small(), [x for x, _ in data[:2]], w, a)
        assert load("benchmarks.peers").quantized_share(net, data[0][0]) == 1.0
        loop = training.Loop(net, data)
        losses = [loop() for _ in range(6)]
        assert losses[-1] < losses[0] + 1
        assert all(torch.isfinite(p).all() for p in net.parameters())
