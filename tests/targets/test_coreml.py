"""Core ML packages: read back with protobuf and numpy alone, computed operation by operation with torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith._files import atomic_folder
from bitsmith.export.constants import Weight, spread
from bitsmith.export.program import ExportError
from bitsmith.model.apply import additions_of
from bitsmith.model.keys import encode_key
from bitsmith.model.network import network
from bitsmith.targets import Artifact, ArtifactError, CoreMl, TargetError
from bitsmith.targets._coreml_weights import Form, needed, packed, smallest
from bitsmith.technique import Technique
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import data_root
from bitsmith.zoo.ds_cnn import pretrained_ds_cnn
from bitsmith.zoo.weights import load_npz
from mlpackage import Package

needs_coremltools = pytest.mark.skipif(
    not any((Path(folder) / "coremltools").is_dir() for folder in sys.path if folder),
    reason='needs coremltools: pip install "bitsmith[coreml]"',
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.right = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(32, 32, 1)
        self.sparse = nn.Conv2d(32, 32, 3, bias=False)
        self.last = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x) + x)
        x = self.wide(torch.relu(self.right(x)))
        x = torch.relu(self.last(self.sparse(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net()
        for module in (model.norm, model.last):
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
        return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LOW: Mapping[str, Technique] = {
    "stem": bs.Palette(4),
    "left": bs.Palette(1),
    "right": bs.Palette(6, "uniform"),
    "wide": bs.Int(8, None),
    "sparse": bs.Sparse(0.2),
    "head": bs.Int(8, None, affine_weights=True, granularity="tensor"),
}
HIGH: Mapping[str, Technique] = {
    "stem": bs.Palette(3),
    "left": bs.Int(4, None),
    "right": bs.Palette(2, group=16),
    "wide": bs.Int(8, None, of=bs.Palette(3)),
    "sparse": bs.Palette(4, of=bs.Sparse(0.2)),
    "head": bs.Int(4, None, granularity="group", group=16),
}


def simulated(applied: nn.Module, site: str, x: Any) -> np.ndarray:
    """The weights that a cell computes with: as made before a normalisation is folded in, or as its operation got."""
    cell: Any = additions_of(applied).cells[encode_key(site)]
    got: list[Tensor] = []
    before = cell.op

    def op(*operands: Tensor, **rest: Any) -> Any:
        got.append(operands[1])
        return before(*operands, **rest)

    cell.op = op
    with torch.no_grad():
        applied(x)
    cell.op = before
    makes = getattr(cell, "makes", None)
    weight = got[0] if makes is None else makes(applied.get_parameter(f"{site}.weight"))
    return np.asarray(weight.detach().numpy())


def exported(
    model: nn.Module, sites: Mapping[str, Technique], folder: Path, target: CoreMl, x: Tensor = X
) -> tuple[nn.Module, Artifact, Package]:
    applied = bs.apply(model, bs.Plan(dict(sites)), [(x, None)])
    artifact = bs.export(applied, target, folder / "net.mlpackage", x[:1])
    return applied, artifact, Package(artifact.path)


def check_values(applied: nn.Module, package: Package, sites: Mapping[str, Technique], x: Tensor) -> None:
    for site in sites:
        name = f"weight_{site}".replace(".", "_")
        assert np.array_equal(package.weights[name], simulated(applied, site, x)), site
    with torch.no_grad():
        wanted = applied(x[:1])
    (found,) = package.run(x[:1])
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@needs_coremltools
@pytest.mark.parametrize(("sites", "version", "kinds"), [
    (LOW, 7, {"lut_to_dense": 3, "affine_dequantize": 2, "sparse_to_dense": 1}),
    (HIGH, 9, {"lut_to_dense": 3, "blockwise_shift_scale": 3, "lut_to_sparse": 1, "sparse_to_dense": 1}),
], ids=["iOS16", "iOS18"])  # fmt: skip
def test_the_file_holds_the_simulated_weights_bit_for_bit(
    sites: Mapping[str, Technique], version: int, kinds: Mapping[str, int], tmp_path: Path
) -> None:
    applied, artifact, package = exported(net(), sites, tmp_path, CoreMl())
    assert package.spec.specificationVersion == version
    check_values(applied, package, sites, X)
    stored = [kind.removeprefix("constexpr_") for kind in package.kinds if kind.startswith("constexpr_")]
    assert {kind: stored.count(kind) for kind in stored} == kinds
    # the same layers as before; factors by channel stand behind them
    assert package.kinds.count("conv") == 5
    assert package.kinds.count("linear") == 1
    # indices take their bits and no more, in whole bytes; all of it the file's size
    bits = {"stem": sites["stem"].w, "right": sites["right"].w}  # type: ignore[attr-defined]
    for site, width in bits.items():
        weight = applied.get_parameter(f"{site}.weight")
        assert package.arrays[f"weight_{site}/indices"] == math.ceil(weight.numel() * width / 8), site
    filled = sum(64 + 64 * math.ceil(size / 64) for size in package.arrays.values())
    assert 64 + filled - 63 <= len(package.blob) <= 64 + filled
    assert artifact.bytes == sum(p.stat().st_size for p in artifact.path.rglob("*") if p.is_file())
    seen = CoreMl().inspect(artifact)
    assert all(seen[site].precision == "size only" for site in sites)
    assert "constexpr_lut_to_dense" in seen["stem"].reason
    assert not list(tmp_path.glob(".*"))


@needs_coremltools
def test_equal_networks_give_equal_files_that_are_noticed_when_they_change(tmp_path: Path) -> None:
    sites = {"right": bs.Palette(4)}
    _, first, package = exported(net(), sites, tmp_path / "a", CoreMl("float16"))
    _, second, _ = exported(net(), sites, tmp_path / "b", CoreMl("float16"))
    assert [p.read_bytes() for p in first.files] == [p.read_bytes() for p in second.files]
    assert Artifact.load(first.path) == first
    half = simulated(bs.apply(net(), bs.Plan(sites), [(X, None)]), "right", X).astype(np.float16)
    assert np.array_equal(package.weights["weight_right_cast_fp16"], half)
    with torch.no_grad():
        assert torch.allclose(package.run(X[:1])[0], net()(X[:1]), atol=0.1)
    blob = first.path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    blob.write_bytes(blob.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="is not the file that was exported"):
        Artifact.load(first.path)


@needs_coremltools
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "technique"), [
    ("float", bs.Float()),
    ("sparse integers", bs.Int(8, None, of=bs.Sparse(0.2))),
    ("all three", bs.Int(8, None, of=bs.Palette(4, of=bs.Sparse(0.2)))),
    ("integers of a palette, by channel", bs.Int(4, None, of=bs.Palette(2))),
    ("seven bits", bs.Palette(7)),
    ("given", bs.Palette(2, values=(-0.1, 0.0, 0.1))),
    ("binary", bs.Binary()),
    ("codes", bs.Ovsf(0.5)),
    ("tensor, 4 bits", bs.Int(4, None, granularity="tensor")),
    ("affine, 4 bits", bs.Int(4, None, affine_weights=True)),
    ("blocks", bs.Sparse(0.25, "block")),
])  # fmt: skip
@pytest.mark.parametrize("system", ["iOS16", "iOS18"])
def test_other_techniques(kind: str, technique: Technique, system: Any, tmp_path: Path) -> None:
    target = CoreMl(system=system)
    if not target.supports(technique, network(net(), X).record.site("right")):
        pytest.skip(f"{technique} needs iOS 18")
    applied, _, package = exported(net(), {"right": technique}, tmp_path, target)
    with torch.no_grad():
        wanted = applied(X[:1])
    assert torch.allclose(package.run(X[:1])[0], wanted, rtol=1e-4, atol=1e-5)
    if kind not in ("float", "codes"):
        assert np.array_equal(package.weights["weight_right"], simulated(applied, "right", X))


@needs_coremltools
@pytest.mark.slow
@pytest.mark.parametrize("layer", [
    nn.Conv1d(8, 16, 3), nn.Conv3d(8, 8, 3), nn.ConvTranspose2d(8, 16, 3), nn.Linear(8, 64), nn.Embedding(32, 16),
], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_other_layers(layer: nn.Module, tmp_path: Path) -> None:
    """Their weights, whatever the converter does to the layer around them."""
    shape = {3: (1, 8, 6), 4: (1, 8, 6, 6), 5: (1, 8, 6, 6, 6)}.get(layer.weight.dim(), (1, 8))  # type: ignore[operator]
    x = torch.randint(0, 32, (1, 4)) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    for technique in (bs.Palette(4), bs.Int(8, None), bs.Int(4, None)):
        model = nn.Sequential(layer).eval()
        if not technique.fits(network(model, x).record.site("0")):
            continue
        applied = bs.apply(model, bs.Plan({"0": technique}), [(x, None)])
        artifact = bs.export(applied, CoreMl(), tmp_path / "net.mlpackage", x)
        found = Package(artifact.path).weights["weight_0"]
        assert np.array_equal(found.ravel(), simulated(applied, "0", x).ravel())


@needs_coremltools
@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", ["resnet20", "ds_cnn"])
def test_real_networks(name: str, precision: Any, tmp_path: Path) -> None:
    root = data_root()
    assert root is not None
    if name == "resnet20":
        model, x = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval(), torch.randn(4, 3, 32, 32)
    else:
        model, x = pretrained_ds_cnn(root).eval(), torch.randn(4, 1, 49, 10)
    record = network(model, x).record
    sites = {site: bs.Palette(4) for site, entry in record.sites.items() if bs.Palette(4).fits(entry)}
    applied, artifact, package = exported(model, sites, tmp_path, CoreMl(precision), x)
    if precision == "float32":
        check_values(applied, package, sites, x)
    else:
        for site in sites:
            half = simulated(applied, site, x).astype(np.float16)
            assert np.array_equal(package.weights[f"weight_{site}_cast_fp16".replace(".", "_")], half), site
    assert "batch_norm" not in package.kinds
    layers = [entry for entry in record.sites.values() if entry.kind in ("conv2d", "linear")]
    assert package.kinds.count("conv") + package.kinds.count("linear") == len(layers)
    assert package.kinds.count("constexpr_lut_to_dense") == len(sites) == len(layers)
    assert package.spec.specificationVersion == 7
    promised = sum(bs.Palette(4).bits(record.site(site)) for site in sites) / 8
    # for each layer four arrays (indices, palette, two by channel), each with its entry and filled up
    assert len(package.blob) < promised + len(sites) * 8 * 128
    assert artifact.bytes > len(package.blob)


# -- forms, without Core ML ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([16, 18]), st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99)
)  # fmt: skip
def test_every_form_gives_the_weights_back(rank: int, version: int, bits: int, density: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(int(size) for size in 4 * generator.integers(1, 5, rank + 1))
    integers = generator.integers(-(2 ** min(bits, 8) // 2), 2 ** min(bits, 8) // 2, shape).astype(np.int8)
    integers = (integers * (generator.random(shape) < density)).astype(np.int8)
    scale = generator.uniform(0.1, 1, (shape[0], *[1] * rank)).astype(np.float32)
    weights = [
        Weight("a", integers.astype(np.float32) * scale, integers, scale),
        Weight("b", integers.astype(np.float32) / np.float32(7)),
        Weight("c", generator.standard_normal(shape).astype(np.float32)),
    ]
    for weight in weights:
        for rows in (1, 4):
            form = smallest(weight, rows, version, 32)
            assert np.array_equal(form.decoded(), weight.values)
            assert form.bytes <= smallest(weight, 1, 16, 32).bytes or version == 16
            assert form.width in (1, 2, 3, 4, 6, 8, 32)


def test_the_lowest_system_that_holds_them() -> None:
    generator = np.random.default_rng(0)
    few = Weight("few", generator.choice(np.linspace(-1, 1, 16, dtype=np.float32), (64, 64)))
    grouped = Weight("grouped", few.values * np.repeat([[1.0], [1.1]], 32, 0).astype(np.float32))
    assert needed([(few, 1)], 32) == 16
    assert needed([(few, 1), (grouped, 2)], 32) == 18
    assert smallest(few, 1, 16, 32).bytes == 64 + 64 * 64 // 2 + 64 + 64
    assert isinstance(smallest(few, 1, 16, 16), Form)


def test_bits_are_packed_from_the_low_end() -> None:
    """The example of coremltools' documentation of iOS 16's ``constexpr_lut_to_dense``."""
    assert [f"{byte:08b}" for byte in packed(np.array([0, 3, 2, 1, 3]), 2)] == ["01101100", "00000011"]
    assert spread(np.array([[1], [2]]), (4, 2)).tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]


# -- what is refused -----------------------------------------------------------------------------------------------


def test_activations_stay_float_and_old_systems_have_few_forms() -> None:
    site = network(net(), X).record.site("right")
    target = CoreMl()
    for technique in (bs.Int(8, 8), bs.Int(4, 8), bs.Winograd(), bs.Float(dtype="bfloat16")):
        verdict = target.supports(technique, site)
        assert not verdict
        assert str(verdict)
    assert target.supports(bs.Int(4, None), site) is True
    for technique in (bs.Int(4, None), bs.Palette(4, group=8), bs.Int(8, None, granularity="group", group=4)):
        assert "iOS18" in str(CoreMl(system="iOS17").supports(technique, site))
    with pytest.raises(ValueError, match="precision"):
        CoreMl("bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iOS15"):
        CoreMl(system="iOS15")  # type: ignore[arg-type]


def test_plans_are_left_as_they_are_and_judged() -> None:
    record = network(net(), X).record
    plan = bs.Plan({"stem": bs.Palette(4), "right": bs.Int(8, 8)})
    assert CoreMl().adapt(plan, record) == plan
    found = CoreMl("float16").realise(plan, record)
    assert set(found) == set(record.sites)
    assert str(found["stem"]).count("size only")
    assert not found["right"]
    assert str(found["head"]).count("float16")


@needs_coremltools
def test_what_cannot_be_written_says_where_and_what_to_do(tmp_path: Path) -> None:
    applied = bs.apply(net(), bs.Plan({"right": bs.Int(8, 8)}), [(X, None)])
    with pytest.raises(TargetError, match="'right' cannot be written for Core ML: activations stay float"):
        bs.export(applied, CoreMl(), tmp_path / "net.mlpackage", X)
    with pytest.raises(ValueError, match=r"\.mlpackage"):
        bs.export(net(), CoreMl(), tmp_path / "net.onnx", X)

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match="bessel_j0"):
        bs.export(Odd(), CoreMl(), tmp_path / "net.mlpackage", X)
    assert not list(tmp_path.iterdir())


def test_running_and_timing_say_what_takes_a_mac(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "net.mlpackage", "mlpackage", {}, {}, (), (), 1, "coreml")
    target = CoreMl()
    for ask in (
        lambda: target.run(artifact, [X.numpy()]),
        lambda: target.measure([artifact]),
        lambda: target.site_times(artifact),
    ):
        with pytest.raises(TargetError, match=r"net\.mlpackage cannot be (run|timed) here: .* On a Mac: .*OnnxRuntime"):
            ask()
    task = bs.Task(calibration=[(X, None)], validation=[(X, None)], metric=bs.metrics.top1)
    with pytest.raises(TargetError, match=r"coreml writes files and runs none here: .* export .* with CoreMl"):
        bs.profile(net(), task, [bs.Palette(4)], target)


def test_the_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(TargetError, match=r'pip install "bitsmith\[coreml\]"'):
        bs.export(net(), CoreMl(), tmp_path / "net.mlpackage", X)


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "made"

    def fill(text: str, fail: bool = False) -> Any:
        def write(folder: Path) -> None:
            folder.mkdir()
            (folder / "a").write_text(text, encoding="utf-8")
            if fail:
                raise OSError("full")

        return write

    assert atomic_folder(place, fill("one")) == place
    with pytest.raises(OSError, match="full"):
        atomic_folder(place, fill("two", fail=True))
    assert (place / "a").read_text(encoding="utf-8") == "one"
    atomic_folder(place, fill("three"))
    assert (place / "a").read_text(encoding="utf-8") == "three"
    assert list(tmp_path.iterdir()) == [place]
