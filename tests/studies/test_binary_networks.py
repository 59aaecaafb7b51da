"""The study of binary networks, whole, on a few images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import bitsmith as bs
from bitsmith.zoo.cifar_resnet import resnet20
from repository import load

load("benchmarks.harness")
command = load("studies._command")
study, nets = load("studies.binary_networks.__main__"), load("studies.binary_networks.nets")
train, parts, tables = (load(f"studies.binary_networks.{name}") for name in ("train", "parts", "tables"))


def data(shape=(28, 28), count=120):
    """Noise with a bright row by class."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for _ in range(3):
        y = torch.randint(0, 10, (count,), generator=generator)
        x = 0.3 * torch.randn(count, *shape, generator=generator)
        for one, label in zip(x, y.tolist(), strict=True):
            one[..., 2 * label : 2 * label + 2, :] += 1.0
        splits.append((x, y))
    return nets.Data(*splits)


@pytest.fixture
def small(monkeypatch, tmp_path):
    for module in (command, study):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "data_root", lambda: tmp_path)
    monkeypatch.setattr(study, "mnist_data", lambda root: data())
    monkeypatch.setattr(study, "cifar_data", lambda root: data((3, 32, 32), 40))
    monkeypatch.setitem(train.NETWORKS, "mlp", lambda *, binary: nets.mlp(16, binary=binary))
    monkeypatch.setattr(train, "BATCH", 20)
    (tmp_path / "cifar10_models").mkdir()
    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in resnet20().state_dict().items() if "tracked" not in name}
    np.savez(tmp_path / "cifar10_models" / "resnet20.npz", **state)
    return tmp_path


def test_every_part_runs_and_a_second_run_only_reads(small, capsys):
    options = ["--seeds", "1", "--steps", "4", "--threads", "1"]
    only = [word for name in study.PARTS for word in ("--only", name)]
    threads = torch.get_num_threads()
    try:
        study.main([*options, *only])
        first = json.loads((small / "binary_networks.json").read_text(encoding="utf-8"))
        capsys.readouterr()
        study.main([*options, *only])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    again = json.loads((small / "binary_networks.json").read_text(encoding="utf-8"))
    assert first["rows"] == again["rows"]
    counts = {name: sum(row["part"] == name for row in first["rows"]) for name in study.PARTS}
    assert counts == {"tune": 16, "mnist": 24, "errors": 1, "tasks": 6, "cifar": 12, "resnet": 3}
    assert not first["left_out"]
    assert " s\n" not in printed.partition("commit")[0]  # nothing was made again
    for name in ("curves", "errors"):
        assert (small / f"binary_networks_{name}.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_first_layer_reads_floats_and_all_clip_at_the_same_time():
    net = nets.mlp(16, binary=True)
    plan = nets.plan(net, torch.zeros(2, 28, 28), "from half", 0.25)
    read = [technique.activations for technique in plan.sites.values()]
    assert read == [False, True, True, True]
    assert set(plan.sites.values()) == {
        bs.Binary("none", first, cancel_gradient=0.5, clip_weights=0.5, error_rate=0.25) for first in (False, True)
    }


def test_both_kinds_of_a_network_have_the_same_weights():
    for network in ("mlp", "convnet"):
        one, other = (train.made(network, 3, binary=binary).state_dict() for binary in (False, True))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_training_learns_and_looks(monkeypatch):
    monkeypatch.setitem(train.NETWORKS, "mlp", lambda *, binary: nets.mlp(64, binary=binary))
    monkeypatch.setattr(train, "BATCH", 20)
    setting = train.Setting("mlp", "Adam", "from half", train.SCRATCH, 0, 100, 3e-3)
    found = train.record(setting, data(), None)
    assert train.LOOKS <= len(found["looks"]) <= train.LOOKS + 1
    assert found["last"] > 0.5
    assert found["best"] >= max(look[2] for look in found["looks"]) - 1e-9
    assert any(look[3] > 0 for look in found["looks"])
    assert train.reached(found, 0.4) is not None
    assert train.reached(found, 1.01) is None


def test_permutations_keep_the_first_task_as_it_is():
    given = data()
    same, other = given.permuted(0), given.permuted(1)
    assert torch.equal(same.train[0], given.train[0].flatten(1))
    assert not torch.equal(other.test[0], same.test[0])
    assert torch.equal(other.test[0].sort(1).values, same.test[0].sort(1).values)


def test_the_square_hinge():
    output = torch.tensor([[2.0, -0.5, 0.25]], dtype=torch.float64)
    # 1 - 2 < 0; 1 - 0.5; 1 + 0.25
    assert float(nets.square_hinge(output, torch.tensor([0]))) == pytest.approx((0.0 + 0.25 + 1.5625) / 3)


def test_pairs_differ_in_one_choice_only(capsys):
    def one(optimizer, last):
        setting = train.Setting("mlp", optimizer, "no clipping", train.SCRATCH, 0, 4, 0.1)
        return setting, {"last": last, "looks": [[k, 1.0, last / 2, 0.0] for k in range(4)]}

    tables.apart([one("Adam", 0.9), one("SGD", 0.7), one("momentum", 0.8)], "title")
    printed = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if " - " in line}
    assert [cell.strip() for cell in rows["Adam - SGD"]] == ["1", "10.00", "10.00", "20.00", "1/1"]
    assert [cell.strip() for cell in rows["momentum - SGD"]][-2:] == ["10.00", "1/1"]
