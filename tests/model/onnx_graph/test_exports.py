"""Networks as exporters write them: same numbers as ONNX Runtime, same sites as the network, quantized the same."""

from __future__ import annotations

import collections
import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.export.program import quiet
from bitsmith.zoo.cifar_resnet import resnet20
from model.onnx_graph.graphs import compare

EXPORTERS = ["dynamo", "torchscript-13", "torchscript-17"]


def write(model: nn.Module, args: tuple[Tensor, ...], path: Path, exporter: str) -> Path:
    """An ONNX file with a dynamic batch, by either of torch's exporters."""
    with warnings.catch_warnings(), quiet(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # what the exporters say about themselves
        if exporter == "dynamo":
            batch = torch.export.Dim("batch", min=1)
            shapes: Any = tuple({0: batch} for _ in args)
            torch.onnx.export(model, args, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            names = [f"in.{index}" for index in range(len(args))]
            axes = {name: {0: "batch"} for name in (*names, "out")}
            torch.onnx.export(
                model, args, path, dynamo=False, opset_version=int(exporter[-2:]), input_names=names,
                output_names=["out"], dynamic_axes=axes,
            )  # fmt: skip
    return path


class Squeeze(nn.Module):
    """Fire modules (SqueezeNet): two convolutions concatenated; ceil_mode pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 4, 1)
        self.left, self.right, self.head = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)
        x = F.relu(self.squeeze(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return F.adaptive_avg_pool2d(F.relu(self.head(x)), 1).flatten(1)


class Inverted(nn.Module):
    """An inverted residual (MobileNetV2): expand, depthwise, project; ReLU6 or SiLU with squeeze and excitation."""

    def __init__(self, act: type[nn.Module], excite: bool) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), act())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), act())
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.excite = nn.Sequential(nn.Conv2d(16, 4, 1), act(), nn.Conv2d(4, 16, 1), nn.Sigmoid()) if excite else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        if self.excite is not None:
            y = y * self.excite(F.adaptive_avg_pool2d(y, 1))
        return x + self.project(y)


def mobile(act: type[nn.Module], excite: bool) -> nn.Module:
    blocks = [Inverted(act, excite) for _ in range(2)]
    return nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), act(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5),
    )  # fmt: skip


def speech() -> nn.Module:
    """A separable network on spectra (DS-CNN)."""
    layers: list[nn.Module] = [nn.Conv2d(1, 8, (10, 4), (2, 2), (5, 1), bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d((24, 5)), nn.Flatten(), nn.Linear(8, 12))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        logits: Tensor = self.head(y[:, -1])
        return logits


class First(nn.Module):
    """The first of a transformer's outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)[0]
        return out


class FirstOfMasked(First):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.model(x, mask)[0]
        return out


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    return FirstOfMasked(transformers.BertModel(config, add_pooling_layer=False))


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        attn_implementation="eager",
    )  # fmt: skip
    return First(transformers.ViTModel(config, add_pooling_layer=False))


def noise(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


def words(n: int) -> tuple[Tensor, ...]:
    mask = torch.ones(n, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    return torch.randint(0, 50, (n, 7), generator=torch.Generator().manual_seed(1)), mask


Make = tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], dict[str, int]]
# kind -> how many fewer such sites the file has: statistics are folded by the exporter, fixed embeddings too
NETWORKS: dict[str, Make] = {
    "resnet": (resnet20, lambda n: noise(n, 3, 32, 32), {"batch_norm": 19}),
    "squeezenet": (Squeeze, lambda n: noise(n, 3, 32, 32), {}),
    "mobilenet": (lambda: mobile(nn.ReLU6, False), lambda n: noise(n, 3, 16, 16), {"batch_norm": 7}),
    "efficientnet": (lambda: mobile(nn.SiLU, True), lambda n: noise(n, 3, 16, 16), {"batch_norm": 7}),
    "hardswish": (lambda: mobile(nn.Hardswish, True), lambda n: noise(n, 3, 16, 16), {"batch_norm": 7}),
    "ds-cnn": (speech, lambda n: noise(n, 1, 49, 10), {"batch_norm": 5}),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda n: noise(n, 5, 6), {}),
    "gru": (lambda: Recurrent(nn.GRU), lambda n: noise(n, 5, 6), {}),
    "bert": (bert, words, {}),
    "vit": (vit, lambda n: noise(n, 3, 16, 16), {}),
}
WEIGHTED = (
    "conv2d",
    "linear",
    "matmul",
    "lstm",
    "gru",
    "relu",
    "relu6",
    "silu",
    "gelu",
    "hardswish",
    "layer_norm",
    "cat",
)


def kinds(sites: Any) -> collections.Counter[str]:
    # torch has two names for one function of limits 0 and 6, and LSTM layers are one node each in ONNX
    return collections.Counter({"hardtanh": "relu6"}.get(site.kind, site.kind) for site in sites.values())


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        (name, exporter)
        for name in NETWORKS
        for exporter in EXPORTERS
        if exporter[-2:] != "17" or name in ("bert", "vit")
    ],
)
def test_exported_networks(name: str, exporter: str, tmp_path: Path) -> None:
    make, inputs, fewer = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    path = write(model, inputs(2), tmp_path / "net.onnx", exporter)
    given = inputs(3)
    net = compare(path, {str(k): x.numpy() for k, x in enumerate(given)})
    with torch.no_grad():
        torch.testing.assert_close(net(*given), model(*given), rtol=1e-4, atol=1e-5)
    ours, theirs = kinds(bs.sites(net, given)), kinds(bs.sites(model, given))
    if name in ("lstm", "gru"):
        theirs[name] = 2 if ours[name] == 2 else ours[name]
    for kind in WEIGHTED:
        assert ours[kind] == theirs[kind], kind
    assert theirs["batch_norm"] - ours["batch_norm"] in (0, fewer.get("batch_norm", 0))


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit"])
def test_quantized_and_written_again_it_is_the_same_network(name: str, tmp_path: Path) -> None:
    make, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    net = bs.load(write(model, inputs(2), tmp_path / "net.onnx", "dynamo" if name != "vit" else "torchscript-17"))
    data = [(inputs(4), torch.zeros(4))]
    target = bs.targets.OnnxRuntime()
    # range choices on a few samples may fall either way where two candidates are as good
    ours, theirs = (bs.quantize(m, data, target, choose=False, prepare=()) for m in (net, model))
    chosen, wanted = bs.plan_of(ours).sites, bs.plan_of(theirs).sites
    assert len(chosen) == len(wanted)
    with torch.no_grad():
        exact, near, other = model(*inputs(4)), ours(*inputs(4)), theirs(*inputs(4))
    # exporters fold statistics in another order of operations: single steps differ
    gap, noise_of = float((near - other).norm()), float((other - exact).norm())
    assert gap <= 0.5 * noise_of
    artifact = bs.export(ours, target, tmp_path / "int8.onnx", inputs(4), batch=4)
    run = target.run(artifact, [x.numpy() for x in inputs(4)])[0]
    if name != "resnet":  # of random weights: what rounds the other way grows through it, though every site holds
        assert float((torch.from_numpy(run) - near).norm()) < 0.2 * noise_of
    check = bs.verify(ours, artifact, data, target=target)
    assert check.passed, check
    assert check.worst_agree == 1.0
    # all that was asked for runs in int8, as far as it does for the network itself
    other_artifact = bs.export(theirs, target, tmp_path / "other.onnx", inputs(4), batch=4)
    read, other_read = target.inspect(artifact), target.inspect(other_artifact)
    counted = collections.Counter(read[site].precision for site in chosen)
    assert counted == collections.Counter(other_read[site].precision for site in wanted)
    assert counted["int8"] >= 0.7 * len(chosen)
