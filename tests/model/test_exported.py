"""Programs of ``torch.export``: the same sites, names and numbers as the module they came from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.exported import ExportedError, _to, from_program
from bitsmith.zoo.cifar_resnet import resnet20

BATCH = torch.export.Dim("batch", min=1)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def exported(model: nn.Module, *args: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), args, dynamic_shapes=tuple({0: BATCH} for _ in args))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet20().eval()


@pytest.fixture(scope="module")
def loaded(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.export.save(exported(resnet, images(2)), path)
    return bs.load(path, trusted=True)


def test_parameters_keep_their_names_and_outputs_are_the_same(resnet: nn.Module, loaded: nn.Module) -> None:
    assert set(loaded.state_dict()) == set(resnet.state_dict())
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in resnet.named_parameters()}
    assert not loaded.training
    with torch.no_grad():
        for n in (1, 5):
            assert torch.equal(loaded(images(n)), resnet(images(n)))
        assert torch.equal(copy.deepcopy(loaded)(x=images()), resnet(images()))


def test_sites_are_those_of_the_module(resnet: nn.Module, loaded: nn.Module) -> None:
    ours, theirs = bs.sites(loaded, images()), bs.sites(resnet, images())
    # a call in a module's own forward is a child here: layer1.0:add is layer1.0.add
    spelled = [
        (name.replace(":", ".").removeprefix(".").replace("relu.1", "relu_1"), s.kind) for name, s in theirs.items()
    ]
    assert [(name, site.kind) for name, site in ours.items()] == spelled
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        assert mine.fold == other.fold
        assert (mine.macs, len(mine.epilogue), mine.bias) == (other.macs, len(other.epilogue), other.bias)


def test_quantized_it_is_the_same_network(resnet: nn.Module, loaded: nn.Module, tmp_path: Path) -> None:
    data = [(images(), torch.zeros(4))]
    ours, theirs = bs.quantize(loaded, data), bs.quantize(resnet, data)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()))
    target = bs.targets.OnnxRuntime()
    artifact = bs.export(ours, target, tmp_path / "net.onnx", images(), batch=4)
    assert {r.precision for r in target.inspect(artifact).values()} == {"int8", "folded"}


class Mixed(nn.Module):
    """Layers whose functions take other arguments in ATen, a module called twice, a view of sizes, a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = nn.GroupNorm(2, 8)
        self.twice = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, ids: Tensor, extra: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        x, _ = self.rnn(x)
        x = self.encoder(x) * self.scale + extra.unsqueeze(1)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.twice(F.gelu(self.twice(x)))
        both = torch.cat([x, x.flip(-1)], -1)[:, ::2]
        return {"mean": both.mean(1), "flat": x.reshape(x.shape[0], -1)[:, 1:]}


# torch.export itself says that nn.LSTM keeps a list of its weights
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
@pytest.mark.filterwarnings(r"ignore:The tensor attributes self\.rnn\._flat_weights:UserWarning")
@pytest.mark.parametrize("decomposed", [False, True])
def test_layers_of_every_kind(decomposed: bool) -> None:
    torch.manual_seed(0)
    model = Mixed()
    ids, extra = torch.randint(0, 9, (3, 5)), torch.randn(3, 8)
    program = exported(model, ids, extra)
    net = from_program(program.run_decompositions() if decomposed else program)
    assert set(net.state_dict()) == set(model.state_dict())
    ids, extra = torch.randint(0, 9, (6, 5)), torch.randn(6, 8)
    with torch.no_grad():
        made, wanted = net(ids, extra=extra), model(ids, extra)
    assert made.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(made[key], wanted[key], rtol=1e-4, atol=1e-5)
    sites = bs.sites(net, (ids, extra))
    if not decomposed:
        kinds = {name: site.kind for name, site in sites.items()}
        assert kinds["rnn"] == "lstm"
        assert kinds["table"] == "embedding"
        assert kinds["encoder.norm1"] == "layer_norm"
        assert [kinds[name] for name in kinds if name.startswith("twice")] == ["linear", "linear"]
        assert all(sites[name].weight is not None for name in kinds if kinds[name] == "linear")


def test_a_pt2_is_only_read_when_trusted(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"whatever: nothing of it is read")
    with pytest.raises(ExportedError, match=r"unpickles.*trusted=True"):
        bs.load(path)
    with pytest.raises(ExportedError, match="cannot be read as an exported program"):
        bs.load(path, trusted=True)
    with pytest.raises(ExportedError, match="is not a file"):
        bs.load(tmp_path / "none.pt2", trusted=True)


def test_a_program_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),))
    with pytest.raises(ExportedError, match=r"changes '1\.num_batches_tracked' when.*export model\.eval\(\)"):
        from_program(program)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))


def test_control_flow_is_refused() -> None:
    with pytest.raises(ExportedError, match="control flow or regions that nothing can be seen in: 'cond'"):
        from_program(torch.export.export(Branching(), (torch.randn(3),)))


def test_inputs_are_checked(loaded: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"has shape \(1, 3, 16, 16\), but the file fixes"):
        loaded(torch.zeros(1, 3, 16, 16))


class Moves(nn.Module):
    """What Keras does with every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.to("cpu").to(torch.float32)).to(torch.float64)
        return made


def test_moves_to_a_type_and_a_device_are_read() -> None:
    model, x = Moves().eval(), torch.randn(2, 4, dtype=torch.float64)
    program = torch.export.export(model, (x,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.to.dtype_layout" in targets, "else this tests nothing"
    found = from_program(program)
    assert torch.equal(found(x), model(x))
    assert "layer" in bs.sites(found, x)
    with pytest.raises(ExportedError, match="sparse"):
        _to(x, layout=torch.sparse_coo)
