"""The pretrained ResNet-20, all int8, on both runtimes: does it run as simulated, and how do peers' files do beside it?

Proof: every site's integers against the simulation fed the same input, the outputs of 1000 images, the precision read
back. Beside it, interleaved in one run: the float file, ours, ONNX Runtime's own quantizer's, and NNCF's if it is
installed, each with its accuracy on the 1000 lossless test images (standard error about one point).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitsmith as bs
from benchmarks.harness import Benchmark, interleaved, table
from bitsmith import targets
from bitsmith.bench import Bench
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import cifar10, data_root, normalise_cifar
from bitsmith.zoo.weights import load_npz

PARTS = {"onnxruntime": (1.5, 2.5), "openvino": (1.5, 2.5)}
BARS = {"onnxruntime": 40.0, "openvino": 35.0}
ROUNDS = 300


def batches(images: Any, labels: Any, size: int = 50) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.from_numpy(normalise_cifar(images))
    y = torch.from_numpy(labels).long()
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def run(bench: Benchmark, target: bs.targets.Target) -> None:
    root = data_root()
    if root is None:
        bench.miss("the data folder is missing: set BITSMITH_DATA")
        return
    data = cifar10(root)
    model = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
    calibration, test = batches(data["x_train"][:256], data["y_train"][:256]), batches(data["x_test"], data["y_test"])
    task = bs.Task(calibration=calibration, validation=calibration, metric=bs.metrics.top1)
    setup = Bench.open(model, task, target)
    offered = {n: bs.Int(8, 8) for n, s in setup.net.record.sites.items() if s.role == "integer"}
    supported = {n: t for n, t in offered.items() if target.supports(t, setup.net.record.sites[n])}
    plan = target.adapt(bs.Plan(supported), setup.net.record)
    ours, base = setup.artifact(plan), setup.artifact(bs.Plan())
    check = bs.verify(setup.simulate(plan), ours, test, target=target, samples=1000)
    realised = [site.realised for site in check.sites]
    table(
        f"{target.name}: run against simulation, {check.samples} images",
        ("whole, dB", "worst site, within one step", "same class, run", "same class, float", "sites", "int8", "folded"),
        [
            (
                check.whole_db,
                check.worst_agree,
                str(check.same_class),
                str(check.float_same_class),
                len(realised),
                realised.count("int8"),
                realised.count("folded"),
            )
        ],
    )
    name = target.name
    bench.row(name, **{k: v for k, v in check.to_json().items() if not isinstance(v, list)})
    bench.judge(f"{name}: whole network", check.whole_db, BARS[name], " dB", at_least=True)
    bench.judge(f"{name}: integers within one step", check.worst_agree, 0.999, at_least=True)
    bench.judge(
        f"{name}: same class as simulated", check.same_class or 0.0, check.float_same_class or 0.0, at_least=True
    )
    bench.judge(f"{name}: sites that did not run as asked", len(check.unrealised), 0)
    files = {"float": base, "Bitsmith": ours, **dict(peers(base, calibration, setup.folder, name))}
    threads = bench.options.threads
    runs = {
        label: opened(target, artifact.path, label in ("float", "Bitsmith"), threads)
        for label, artifact in files.items()
    }
    image = test[0][0][:1].numpy()
    timings = interleaved({label: functools.partial(run_it, image) for label, run_it in runs.items()}, ROUNDS)
    rows = []
    for label, artifact in files.items():
        timing, correct = timings[label], accuracy(runs[label], test)
        low, high = timing.quartiles
        over = timing.median / timings["Bitsmith"].median
        size = artifact.bytes if label in ("float", "Bitsmith") else sum(f.stat().st_size for f in artifact.files)
        rows.append((label, timing.median, (high - low) / 2, f"{over:.2f}", f"{correct:.1%}", size))
        bench.row(name, file=label, ms=timing.median, over_ours=over, top1=correct, samples=1000, bytes=size)
    table(
        f"{name}: batch 1, {threads} threads, {ROUNDS} interleaved rounds; top-1 of 1000 lossless test images",
        ("file", "ms", "+-", "over ours", "top-1", "bytes"),
        rows,
    )


def peers(
    base: bs.Artifact, calibration: list[tuple[Any, Any]], folder: Path, runtime: str
) -> Iterator[tuple[str, bs.Artifact]]:
    """Files that other tools make of the float network with the same 256 images."""
    from onnxruntime import quantization as q

    images = [x[i : i + 1].numpy() for x, _ in calibration for i in range(len(x))]
    source = folder / "float.onnx"
    if runtime == "onnxruntime":
        source = base.path
    else:
        bs.export(resnet(), targets.OnnxRuntime(), source, calibration[0][0], batch=1)
    name = base.inputs[0][0]

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, samples: Iterable[Any]) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else {name: found}

    prepared, quantized = folder / "prepared.onnx", folder / "peer-ort.onnx"
    q.shape_inference.quant_pre_process(str(source), str(prepared))
    q.quantize_static(
        str(prepared), str(quantized), Reader(images), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
    )  # fmt: skip
    yield "ONNX Runtime's quantizer", dataclasses.replace(base, path=quantized, format="onnx")
    try:
        import nncf
    except ImportError:
        print("NNCF is not installed: no figure for it (pip install -c constraints.txt -e '.[peers]')")
        return
    import onnx
    import openvino

    dataset = nncf.Dataset(images, lambda x: {name: x})
    if runtime == "onnxruntime":
        made = folder / "peer-nncf.onnx"
        onnx.save(nncf.quantize(onnx.load(str(source)), dataset, fast_bias_correction=False), str(made))
        yield "NNCF", dataclasses.replace(base, path=made, format="onnx")
    else:
        made = folder / "peer-nncf.xml"
        network = nncf.quantize(openvino.Core().read_model(str(source)), dataset, fast_bias_correction=False)
        openvino.save_model(network, str(made), compress_to_fp16=False)
        yield "NNCF", dataclasses.replace(base, path=made)


def resnet() -> torch.nn.Module:
    root = data_root()
    assert root is not None
    return load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()


def accuracy(run: Callable[[Any], Any], test: list[tuple[Any, Any]]) -> float:
    """Top-1, one image at a time."""
    right = sum(int(np.argmax(run(x[i : i + 1].numpy()))) == int(y[i]) for x, y in test for i in range(len(x)))
    return right / sum(len(y) for _, y in test)


def opened(target: bs.targets.Target, path: Path, ours: bool, threads: int) -> Callable[[Any], Any]:
    """The file as a function. Peers' files run under the runtime's own defaults, ours as the target runs them."""
    if isinstance(target, targets.OnnxRuntime):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        off = ["WeightBiasQuantization"] if ours else []
        session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"], disabled_optimizers=off)
        entry = session.get_inputs()[0].name
        return lambda x: session.run(None, {entry: x})[0]
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0]


def main() -> int:
    bench = Benchmark("resnet20", PARTS, (__doc__ or "").splitlines()[0])
    bench.start()
    threads = bench.options.threads
    for part in bench.chosen:
        run(bench, targets.OnnxRuntime(threads=threads) if part == "onnxruntime" else targets.OpenVino(threads=threads))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
