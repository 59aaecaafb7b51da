"""The peers that make an int8 file of a float ONNX file: ONNX Runtime's quantizer, NNCF on ONNX, NNCF on OpenVINO.

Each is set up as its own documentation advises for CPUs, in the variants between which its users choose, so that the
best counts. Everybody gets the same float file and the same calibration inputs. A peer that is not installed is named
with the line that installs it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from numpy.typing import NDArray

INSTALL = "pip install -c constraints.txt"
ORT, NNCF = "ONNX Runtime", "NNCF"
PERCENTILE = 99.99
Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """A float network for the peers. ``model``: its ONNX file, batch 1. ``feeds``: calibration inputs by input name.

    ``heads``, ``hidden``: of a transformer, else 0.
    """

    model: Path
    feeds: Sequence[Feed]
    heads: int = 0
    hidden: int = 0

    @property
    def transformer(self) -> bool:
        return self.heads > 0


@dataclass(frozen=True)
class FilePeer:
    """``tool``: whose best variant counts. ``make(source, folder)`` writes the file into ``folder``.

    ``transformers``: True for transformers only, False for other networks only, None for both.
    """

    name: str
    tool: str
    package: str
    settings: str
    make: Callable[[Source, Path], Path]
    transformers: bool | None = None

    @property
    def version(self) -> str:
        """Raises ``importlib.metadata.PackageNotFoundError`` where it is not installed."""
        return importlib.metadata.version(self.package)

    def fits(self, source: Source) -> bool:
        return self.transformers is None or self.transformers == source.transformer


class Peer(Protocol):
    """``version`` raises ``importlib.metadata.PackageNotFoundError`` where it is not installed."""

    @property
    def name(self) -> str: ...
    @property
    def package(self) -> str: ...
    @property
    def version(self) -> str: ...


P = TypeVar("P", bound=Peer)
R = TypeVar("R")


@dataclass(frozen=True)
class Made(Generic[P, R]):
    """What became of one peer: what it made and the seconds it took, or why there is nothing."""

    peer: P
    value: R | None
    seconds: float = 0.0
    why: str = ""
    absent: bool = False


def each(peers: Sequence[P], folder: Path, make: Callable[[P, Path], R]) -> Iterator[Made[P, R]]:
    """``make(peer, its folder)`` of one peer after the other; one that breaks does not hide the others."""
    for peer in peers:
        try:
            _ = peer.version
        except importlib.metadata.PackageNotFoundError:
            yield Made(peer, None, why=f"{peer.name}: absent ({INSTALL} {peer.package})", absent=True)
            continue
        work = folder / peer.name.replace(" ", "_").replace(",", "")
        work.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        try:
            with silent():
                value = make(peer, work)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            yield Made(peer, None, why=f"{peer.name}: failed ({type(error).__name__}: {first})")
            continue
        yield Made(peer, value, time.perf_counter() - start)


def made(source: Source, folder: Path, peers: Sequence[FilePeer] | None = None) -> Iterator[Made[FilePeer, Path]]:
    """The files of every peer that fits."""
    fitting = [peer for peer in (FILE_PEERS if peers is None else peers) if peer.fits(source)]
    return each(fitting, folder, lambda peer, work: peer.make(source, work))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the peers' own warnings, log lines and progress bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def write_float(model: Any, example: Any, path: Path, dynamic: bool = False) -> None:
    """The float network as torch writes it in ONNX. ``example``: a tensor or a mapping; ``dynamic``: any batch size."""
    import torch

    by_name = dict(example) if isinstance(example, Mapping) else None
    axes: Any = None
    if dynamic:
        batch = {0: torch.export.Dim("batch", min=1, max=1024)}
        axes = (batch,) if by_name is None else dict.fromkeys(by_name, batch)
    with silent():
        torch.onnx.export(
            model,
            () if by_name is not None else (example,),
            str(path),
            kwargs=by_name,
            dynamic_shapes=axes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


# -- ONNX Runtime's own quantizer ------------------------------------------------------------------------------------


def onnxruntime_static(
    method: str, *, optimizer: bool = False, products_only: bool = False
) -> Callable[[Source, Path], Path]:
    """``quantize_static`` to QDQ after its pre-processing: per channel, u8 activations, s8 weights, full range.

    ``optimizer``: transformers pass through ``onnxruntime.transformers.optimizer`` before, as its documentation advises
    for them; attention stays unfused, since a fused one has no quantized form in QDQ. ``products_only``: only matrix
    products are quantized, not the additions and normalisations between them.
    """

    def make(source: Source, folder: Path) -> Path:
        from onnxruntime import quantization as q

        prepared, path = folder / "prepared.onnx", folder / "model.onnx"
        start = source.model
        if optimizer:
            start = _optimized(source, folder / "optimized.onnx")
        # symbolic inference does not know the optimizer's operators, nor some of a transformer's masks
        try:
            q.shape_inference.quant_pre_process(str(start), str(prepared), skip_symbolic_shape=optimizer)
        except Exception:
            if optimizer:
                raise
            q.shape_inference.quant_pre_process(str(start), str(prepared), skip_symbolic_shape=True)
        q.quantize_static(
            str(prepared),
            str(path),
            _reader(source.feeds),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"] if products_only else None,
            per_channel=True,
            reduce_range=False,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod[method],
            extra_options={"CalibPercentile": PERCENTILE},
        )
        prepared.unlink()
        return path

    return make


def _reader(feeds: Sequence[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else dict(found)

    return Reader()


def _optimized(source: Source, path: Path) -> Path:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.enable_attention = False
    fused = optimizer.optimize_model(
        str(source.model), "bert", num_heads=source.heads, hidden_size=source.hidden, optimization_options=options
    )
    fused.save_model_to_file(str(path))
    return path


# -- NNCF ------------------------------------------------------------------------------------------------------------


def nncf_onnx(fast: bool) -> Callable[[Source, Path], Path]:
    """``nncf.quantize`` of the ONNX model. ``fast``: its default, the fast bias correction; else the accurate one."""

    def make(source: Source, folder: Path) -> Path:
        import onnx

        path = folder / "model.onnx"
        onnx.save(_nncf(onnx.load(str(source.model)), source, fast), str(path))
        return path

    return make


def nncf_openvino(fast: bool) -> Callable[[Source, Path], Path]:
    """The same of the model as OpenVINO reads it, written as OpenVINO's IR."""

    def make(source: Source, folder: Path) -> Path:
        import openvino

        path = folder / "model.xml"
        model = _nncf(openvino.Core().read_model(str(source.model)), source, fast)
        openvino.save_model(model, str(path), compress_to_fp16=False)
        return path

    return make


def _nncf(model: Any, source: Source, fast: bool) -> Any:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf.quantize(
        model,
        nncf.Dataset([dict(feed) for feed in source.feeds]),
        subset_size=len(source.feeds),
        fast_bias_correction=fast,
        model_type=nncf.ModelType.TRANSFORMER if source.transformer else None,
        target_device=nncf.TargetDevice.CPU,
    )


FILE_PEERS: Sequence[FilePeer] = (
    FilePeer("ONNX Runtime, min/max", ORT, "onnxruntime", "quantize_static QDQ", onnxruntime_static("MinMax")),
    FilePeer("ONNX Runtime, entropy", ORT, "onnxruntime", "quantize_static QDQ", onnxruntime_static("Entropy"), False),
    FilePeer(
        "ONNX Runtime, percentile",
        ORT,
        "onnxruntime",
        f"quantize_static QDQ, {PERCENTILE}",
        onnxruntime_static("Percentile"),
    ),
    FilePeer(
        "ONNX Runtime, products only",
        ORT,
        "onnxruntime",
        "quantize_static QDQ, MatMul and Gemm only",
        onnxruntime_static("MinMax", products_only=True),
        True,
    ),
    FilePeer(
        "ONNX Runtime, transformers optimizer",
        ORT,
        "onnxruntime",
        "transformers.optimizer, then quantize_static QDQ, MatMul and Gemm only",
        onnxruntime_static("MinMax", optimizer=True, products_only=True),
        True,
    ),
    FilePeer("NNCF ONNX", NNCF, "nncf", "quantize(), fast bias correction", nncf_onnx(True)),
    FilePeer("NNCF ONNX, accurate", NNCF, "nncf", "quantize(), fast_bias_correction=False", nncf_onnx(False)),
    FilePeer("NNCF OpenVINO", NNCF, "nncf", "quantize(), fast bias correction", nncf_openvino(True)),
    FilePeer("NNCF OpenVINO, accurate", NNCF, "nncf", "quantize(), fast_bias_correction=False", nncf_openvino(False)),
)
"""Entropy with ONNX Runtime's own 128 bins comes out as min/max on most tensors: a percentile stands beside it."""
