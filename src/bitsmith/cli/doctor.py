"""``bitsmith doctor``: what works on this machine, and the exact line that mends what does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from . import show

State = Literal["ok", "missing", "BROKEN"]

CORE = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "safetensors": "safetensors",
    "rich": "rich",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
}
"""Module -> distribution of what Bitsmith always needs."""

EXTRAS = {
    "openvino": ("openvino", "openvino"),
    "sklearn": ("scikit-learn", "demo"),
    "optuna": ("optuna", "explore"),
    "zigzag": ("zigzag-dse", "zigzag"),
    "coremltools": ("coremltools", "coreml"),
}
"""Module -> distribution and extra of what it may use."""

FAST_INT8 = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "i8mm": "Arm I8MM",
    "asimddp": "Arm dot product",
}
"""Flags of /proc/cpuinfo for instructions that multiply 8-bit integers several times as fast as floats."""

BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table. ``core``: nothing works without it."""

    name: str
    state: State
    said: str
    core: bool = False
    mend: str = ""


def add(commands: Any) -> None:
    """Add the command of this file."""
    doctor = commands.add_parser("doctor", help="what works on this machine, and how to install what does not")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(run=run_doctor)


def run_doctor(options: Namespace) -> int:
    found = list(findings())
    broken = [finding for finding in found if finding.core and finding.state != "ok"]
    if options.json:
        from dataclasses import asdict

        show.as_json([asdict(finding) for finding in found])
        return 1 if broken else 0
    # rich itself may be what is broken
    for finding in found:
        print(f"{finding.state:8}{finding.name:18}{finding.said}")
        if finding.mend:
            print(f"{'':26}-> {finding.mend}")
    print("Something that everything needs is broken." if broken else "All that is needed works.")
    return 1 if broken else 0


def findings() -> Iterator[Finding]:
    """Look at everything, the core first."""
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}", True)
    for module, distribution in CORE.items():
        yield package(module, distribution, "")
    yield _works("torch build", _torch_build)
    yield _works("interception", _interception)
    yield _works("store", _sqlite)
    for module, (distribution, extra) in EXTRAS.items():
        yield package(module, distribution, extra)
    yield kernels()
    yield _threads()
    yield processor(_flags())
    yield _data()
    for name, folder in (("this folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        yield writable(name, folder)


def package(module: str, distribution: str, extra: str) -> Finding:
    """Whether a package can be imported, which version it is, and the line that installs it."""
    mend = f'pip install "bitsmith[{extra}]"' if extra else f'pip install "{_requirement(distribution)}"'
    logger = logging.getLogger(module)
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # some remark on each version and system that they were not made for
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            said = f"not installed; {'optional' if extra else 'needed'}"
            return Finding(distribution, "missing", said, not extra, mend)
        return Finding(distribution, "BROKEN", f"it needs {error.name}, which is missing", not extra, mend)
    except Exception as error:  # a broken binary can raise anything
        again = mend.replace("install", "install --force-reinstall --no-deps", 1) if not extra else mend
        return Finding(distribution, "BROKEN", f"{type(error).__name__}: {error}", not extra, again)
    finally:
        logger.setLevel(level)
    return Finding(distribution, "ok", importlib.metadata.version(distribution), not extra)


def kernels() -> Finding:
    """Whether the native kernels are there, for which instructions and which OpenVINO, and whether that takes them."""
    from ..targets import _openvino_kernels

    found = package("bitsmith_kernels", "bitsmith-kernels", "kernels")
    if found.state != "ok":
        again = _openvino_kernels.INSTALL if found.state == "missing" else _openvino_kernels.AGAIN
        return replace(found, mend=again)
    from bitsmith_kernels import isas
    from bitsmith_kernels.openvino import versions

    try:
        built = ", ".join(versions())
        said = f"{found.said}; {', '.join(isas())}; {f'built for OpenVINO {built}' if built else 'without OpenVINO'}"
    except ImportError as error:
        return replace(found, state="BROKEN", said=str(error), mend=_openvino_kernels.AGAIN)
    if (reason := _openvino_kernels.missing()) is not None:
        there = isinstance(_openvino_kernels.extension(), Path)
        return replace(found, state="BROKEN" if there else "missing", said=said, mend=str(reason))
    return replace(found, said=f"{said}, which is here")


def _requirement(distribution: str) -> str:
    """As Bitsmith's own metadata asks for it, such as ``onnx>=1.18``."""
    try:
        lines = importlib.metadata.requires("bitsmith") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    pattern = re.compile(rf"{re.escape(distribution)}(?![\w.-])", re.IGNORECASE)
    return next((line.partition(";")[0].strip() for line in lines if pattern.match(line)), distribution)


def _works(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", look(), True)
    except Exception as error:
        return Finding(name, "BROKEN", f"{type(error).__name__}: {error}", True)


def _torch_build() -> str:
    import torch

    if torch.version.cuda is not None:
        return f"with CUDA {torch.version.cuda}; the measured targets run on the CPU"
    return "with ROCm; the measured targets run on the CPU" if torch.version.hip is not None else "for CPU"


def _interception() -> str:
    import torch

    from ..model.network import sites

    found = sites(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), torch.zeros(2, 4))
    if [site.kind for site in found.values()] != ["linear", "relu"]:
        raise RuntimeError(f"a model of two operations showed {[site.kind for site in found.values()]}")
    return "operations of a model are seen as they run"


def _sqlite() -> str:
    import sqlite3

    from ..store import Store

    with Store(None) as store:
        store.put("doctor", {}, 1)
    return f"SQLite {sqlite3.sqlite_version}"


def _threads() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    said = f"{usable} usable of {os.cpu_count()} CPUs"
    torch = sys.modules.get("torch")
    if torch is not None:
        said += f"; torch uses {torch.get_num_threads()}"
    return Finding("threads", "ok", "; ".join((said, *(f"{name}={value}" for name, value in limits.items()))))


def _flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str] | None:
    """The first processor's features; None where the system does not tell them there."""
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line.group(1).split()) if line else None


def processor(flags: frozenset[str] | None) -> Finding:
    """Which instructions decide how fast 8-bit integers and bfloat16 run."""
    if flags is None:
        name = platform.processor() or platform.machine()
        return Finding("processor", "ok", f"{name}; its features are not told on {platform.system()}")
    integer = ", ".join(name for flag, name in FAST_INT8.items() if flag in flags)
    half = ", ".join(name for flag, name in BFLOAT16.items() if flag in flags)
    said = f"int8: {integer}" if integer else "no int8 dot products: integers may be no faster than floats here"
    return Finding("processor", "ok", f"{said}; bfloat16: {half or 'no instructions'}")


def _data() -> Finding:
    from ..zoo.data import data_root

    folder = data_root()
    if folder is None:
        said = "no data folder; only tests, benchmarks and studies on real data need it"
        return Finding("data", "missing", said, mend="export BITSMITH_DATA=/path/to/data")
    return Finding("data", "ok", str(folder))


def writable(name: str, folder: Path) -> Finding:
    """Whether files can be written there, and how much fits."""
    from .._files import check_writable

    try:
        check_writable(folder)
    except OSError as error:
        return Finding(name, "BROKEN", str(error), mend="change to a folder of your own")
    return Finding(name, "ok", f"{folder} can be written, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free")
