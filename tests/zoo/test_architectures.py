"""Every architecture has its published size and cost, and the parameter names its users rely on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bitsmith.zoo.blocks import ConvNorm, divisible, same_padding
from bitsmith.zoo.ds_cnn import ds_cnn
from bitsmith.zoo.efficientnet import efficientnet_lite0
from bitsmith.zoo.mobilenet import MobileNetV1, mobilenet_v1, mobilenet_v2
from bitsmith.zoo.resnet import resnet18, resnet34, resnet50
from bitsmith.zoo.squeezenet import squeezenet1_0
from bitsmith.zoo.vgg import Vgg, vgg

IMAGE = (3, 224, 224)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The network without memory for its parameters: counting needs none."""
    with torch.device("meta"):
        return make()


def macs(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Multiply-accumulates of one sample by torch's own counter, which counts two operations for each."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape, device=device))
    return counter.get_total_flops() / 2


# torchvision's documentation of its weights: "num_params" and "GFLOPS" (which are multiply-accumulates there)
TORCHVISION = {
    "resnet18": (resnet18, 11_689_512, 1.81),
    "resnet34": (resnet34, 21_797_672, 3.66),
    "resnet50": (resnet50, 25_557_032, 4.09),
    "mobilenet_v2": (mobilenet_v2, 3_504_872, 0.30),
    "squeezenet1_0": (squeezenet1_0, 1_248_424, 0.82),
    "vgg11": (lambda: vgg(11), 132_863_336, 7.61),
    "vgg13": (lambda: vgg(13), 133_047_848, 11.31),
    "vgg16": (lambda: vgg(16), 138_357_544, 15.47),
    "vgg19": (lambda: vgg(19), 143_667_240, 19.63),
    "vgg11_bn": (lambda: vgg(11, batch_norm=True), 132_868_840, 7.61),
    "vgg13_bn": (lambda: vgg(13, batch_norm=True), 133_053_736, 11.31),
    "vgg16_bn": (lambda: vgg(16, batch_norm=True), 138_365_992, 15.47),
    "vgg19_bn": (lambda: vgg(19, batch_norm=True), 143_678_248, 19.63),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_size_and_cost_are_torchvisions(name: str) -> None:
    make, parameters, giga = TORCHVISION[name]
    model = on_meta(make)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(macs(model, IMAGE) / 1e9, 2) == giga


@pytest.mark.parametrize(
    ("width", "resolution", "millions", "mega"),
    # arXiv:1704.04861, tables 6 and 7
    [(1.0, 224, 4.2, 569), (0.75, 224, 2.6, 325), (0.5, 224, 1.3, 149), (0.25, 224, 0.5, 41), (1.0, 160, 4.2, 290)],
)
def test_mobilenet_v1_costs_what_its_paper_says(width: float, resolution: int, millions: float, mega: int) -> None:
    model = on_meta(lambda: mobilenet_v1(width, resolution))
    assert isinstance(model, MobileNetV1)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert macs(model, model.input_shape) / 1e6 == pytest.approx(mega, rel=0.01)


@pytest.mark.parametrize(("width", "mega"), [(1.0, 300), (1.4, 585)])
def test_mobilenet_v2_costs_what_its_paper_says(width: float, mega: int) -> None:
    # arXiv:1801.04381, table 4
    assert macs(on_meta(lambda: mobilenet_v2(width)), IMAGE) / 1e6 == pytest.approx(mega, rel=0.01)


def test_efficientnet_lite0_costs_what_its_publisher_says() -> None:
    # tensorflow/tpu, models/official/efficientnet/lite: 4.7 M parameters, 407 M FLOPs with normalisations
    model = on_meta(efficientnet_lite0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4.65e6, rel=0.001)
    assert macs(model, IMAGE) / 1e6 == pytest.approx(407, rel=0.06)


@pytest.mark.parametrize(
    ("size", "kilobytes", "mega_operations"),
    # arXiv:1711.07128, table 5: 8-bit weights and the two largest neighbouring activations; two operations per product
    [("S", 38.6, 5.4), ("M", 189.2, 19.8), ("L", 497.6, 56.9)],
)
def test_ds_cnn_has_the_memory_and_operations_of_its_paper(size, kilobytes: float, mega_operations: float) -> None:
    model = ds_cnn(size)
    maps: list[int] = []
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.register_forward_hook(lambda _m, _i, out: maps.append(out[0].numel()))
    with torch.no_grad():
        model(torch.zeros(1, 1, 49, 10))
    # normalisations fold into the convolutions, so they take no memory
    weights = sum(p.numel() for name, p in model.named_parameters() if ".norm." not in name)
    activations = max(a + b for a, b in itertools.pairwise(maps))
    assert round((weights + activations) / 1e3, 1) == kilobytes
    assert 2 * macs(model, (1, 49, 10)) / 1e6 == pytest.approx(mega_operations, rel=0.02)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (resnet18, ("conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.bn2.bias", "fc.bias")),
        (resnet50, ("layer1.0.conv3.weight", "layer1.0.downsample.0.weight", "layer3.5.bn3.running_mean")),
        (mobilenet_v2, ("features.0.0.weight", "features.1.conv.1.weight", "features.2.conv.2.weight")),
        (mobilenet_v2, ("features.17.conv.3.running_mean", "features.18.1.bias", "classifier.1.weight")),
        (squeezenet1_0, ("features.0.bias", "features.3.expand3x3.weight", "features.12.squeeze.bias")),
        (squeezenet1_0, ("classifier.1.weight",)),
        (lambda: vgg(16), ("features.0.weight", "features.28.bias", "classifier.6.weight")),
        (lambda: vgg(11, batch_norm=True), ("features.1.running_var", "features.25.weight", "classifier.0.bias")),
    ],
)
def test_keys_are_torchvisions(make: Callable[[], nn.Module], keys: tuple[str, ...]) -> None:
    assert set(keys) <= set(on_meta(make).state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: mobilenet_v1(0.25, 32, 5, seed=seed),
        lambda seed: mobilenet_v2(0.35, 5, seed=seed),
        lambda seed: resnet18(5, seed=seed),
        lambda seed: squeezenet1_0(5, seed=seed),
        lambda seed: efficientnet_lite0(5, seed=seed),
    ],
)
def test_a_seed_gives_the_weights_and_leaves_the_generator(make: Callable[[int], nn.Module]) -> None:
    state = torch.get_rng_state()
    first, again, other = make(1), make(1), make(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = first(x)
        assert out.shape == (2, 5)
        assert torch.isfinite(out).all()
        assert torch.equal(out, again(x))
        assert not torch.equal(out, other(x))


def test_a_residual_of_mobilenet_v2_stands_only_where_the_shape_stays() -> None:
    blocks = list(mobilenet_v2().features)[1:-1]
    # arXiv:1801.04381, table 2: the first block of each stage changes channels or stride, the others neither
    assert [block.shortcut for block in blocks] == [
        repeat > 0 for count in (1, 2, 3, 4, 3, 3, 1) for repeat in range(count)
    ]


def test_divisible_never_takes_a_tenth_away() -> None:
    for tenth in range(10, 4000):
        rounded = divisible(tenth / 10)
        assert rounded % 8 == 0
        assert rounded >= 0.9 * tenth / 10
        assert abs(rounded - tenth / 10) < 8 + 0.1 * tenth / 10


@pytest.mark.parametrize("size", range(1, 30))
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (10, 2), (4, 1), (1, 1), (1, 2)])
def test_same_padding_gives_the_stated_number_of_outputs_with_no_spare_zero(
    size: int, kernel: int, stride: int
) -> None:
    before, after = same_padding(size, kernel, stride)
    outputs = -(-size // stride)
    assert (size + before + after - kernel) // stride + 1 == outputs
    assert 0 <= after - before <= 1
    needed = (outputs - 1) * stride + kernel
    assert before + after == max(0, needed - size)


def test_settings_that_cannot_be_are_errors() -> None:
    with pytest.raises(ValueError, match="width=0"):
        mobilenet_v1(0)
    with pytest.raises(ValueError, match="multiple of 32"):
        mobilenet_v1(1.0, 200)
    with pytest.raises(ValueError, match="width=-1"):
        mobilenet_v2(-1)
    with pytest.raises(ValueError, match="one of 11, 13, 16, 19"):
        Vgg(12)
    with pytest.raises(ValueError, match="one of S, M, L"):
        ds_cnn("XL")  # type: ignore[arg-type]
