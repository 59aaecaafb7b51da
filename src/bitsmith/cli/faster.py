"""``bitsmith accelerate``: native kernels in an int8 file that any tool made."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from . import arguments, show

if TYPE_CHECKING:
    from ..accelerate import Accelerated


def add(commands: Any) -> None:
    """Add the command of this file."""
    accelerate = commands.add_parser("accelerate", help="faster convolutions in an int8 ONNX file that any tool made")
    accelerate.add_argument("source", type=Path, metavar="MODEL.onnx", help="a quantized network (QDQ) of fixed shapes")
    arguments.add_out(accelerate, "the faster network, an .onnx file", "FILE")
    accelerate.add_argument(
        "--data",
        metavar="DATA",
        help="samples: .npy, .npz with the inputs' names, or file.py:function (default: random numbers)",
    )
    accelerate.add_argument("--threads", type=arguments.positive, metavar="N", help="threads of OpenVINO (2)")
    accelerate.add_argument("--rounds", type=arguments.positive, default=40, metavar="N", help="timed runs (40)")
    accelerate.set_defaults(run=run_accelerate)


def run_accelerate(options: Namespace) -> int:
    from ..accelerate import accelerate
    from ..targets.openvino import OpenVino

    target = OpenVino(kernels=True) if options.threads is None else OpenVino(options.threads, kernels=True)
    data = None if options.data is None else _data(options.data)
    found = accelerate(options.source, options.out, data, target=target, rounds=options.rounds)
    print_layers(found)
    show.written(found.artifact.path)
    return 0


def _data(name: str) -> Any:
    """Arrays of samples, or the batches that a function returns."""
    import numpy as np

    from ..accelerate import AccelerateError
    from ..model.load import load_object

    if not name.endswith((".npy", ".npz")):
        found = load_object(name)
        return found() if callable(found) else found
    try:
        loaded: Any = np.load(name, allow_pickle=False)
        return dict(loaded) if name.endswith(".npz") else loaded
    except (ValueError, EOFError, BadZipFile) as error:
        raise AccelerateError(f"{name} is no file of NumPy arrays ({error})") from None


def print_layers(found: Accelerated) -> None:
    """Every convolution, and what was gained in all."""
    options = list(dict.fromkeys(option for layer in found.layers for option in layer.options))
    heads = [f"F({tile}x{tile}) int{bits} ms" for tile, bits in options]
    rows = [
        (
            layer.name,
            f"{layer.ms:.3f}",
            *(f"{layer.options[option]:.3f}" if option in layer.options else "" for option in options),
            "" if layer.chosen is None else "F({0}x{0}) int{1}".format(*layer.chosen),
            layer.reason or ("" if layer.chosen is not None else "not faster"),
        )
        for layer in found.layers
    ]
    where = "given" if found.given else "random"
    caption = (
        f"{found.replaced} of {len(found.layers)} convolutions replaced; before {found.before}; after {found.after}\n"
        f"{found.ratio:.2f} times as fast; outputs against the original's, {found.samples} {where} samples: "
        f"{found.sqnr_db:.1f} dB"
    )
    show.table(("convolution", "ms", *heads, "chosen", "why not"), rows, ("ms", *heads), caption)
