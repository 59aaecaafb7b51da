"""Runs peers: which forms each has, where its environment is, what it said."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.peers.environment import MARK

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.data import items

from ..cells import NETWORKS, TRAINED, Bed, Cell, Subject
from ..forms import FORMS, TRAINED_FORMS

ROOT = Path(__file__).parents[3]
LIMIT_S = 900


@dataclass(frozen=True)
class Peer:
    """``module`` here; ``environment``: a folder of BITSMITH_PEERS, "" for ours; ``forms``: name -> family; ``drawn``:
    those that read calibration samples; ``read``: those that read the float network's ONNX file."""

    name: str
    module: str
    environment: str
    forms: Mapping[str, str]
    drawn: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

    def python(self) -> Path | None:
        """Its interpreter, or None where it is not installed."""
        if not self.environment:
            return Path(sys.executable) if importlib.util.find_spec(self.name) else None
        folder = os.environ.get("BITSMITH_PEERS")
        found = Path(folder or ".") / self.environment / "bin" / "python"
        return found if folder and found.is_file() else None

    def version(self) -> str:
        """What its figures depend on: its version, or all that its environment was asked to hold."""
        if not self.environment:
            return importlib.metadata.version(self.name)
        mark = Path(os.environ["BITSMITH_PEERS"]) / self.environment / MARK
        return mark.read_text() if mark.is_file() else str(mark)

    def install(self) -> str:
        if not self.environment:
            return f"pip install -c constraints.txt {self.name}"
        return f"python -m benchmarks.peers.environment {self.environment} DIR/{self.environment}, BITSMITH_PEERS=DIR"


INTEGERS, PALETTES, PRUNED = "integers", "palettes", "pruned"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "coremltools",
            "core_ml_tools",
            "",
            {
                "int8 weights": INTEGERS,
                "int4 weights": INTEGERS,
                "int4 weights by 32": INTEGERS,
                "palette of 6 bits": PALETTES,
                "palette of 4 bits": PALETTES,
                "palette of 4 bits, scales by channel": PALETTES,
                "palettes of 4 bits by 16 channels": PALETTES,
                "palette of 4 bits, sensitivity": PALETTES,
                "palette of 3 bits": PALETTES,
                "half of the weights": PRUNED,
                "half of the weights, palette of 4": "composed",
                "half, SparseGPT": PRUNED,
            },
            ("palette of 4 bits, sensitivity", "half, SparseGPT"),
        ),
        Peer(
            "NNCF", "nncf", "nncf", {"int8 weights": INTEGERS, "int4 weights": INTEGERS, "half of the weights": PRUNED}
        ),
        Peer(
            "Neural Compressor",
            "neural_compressor",
            "neural_compressor",
            {"int8": INTEGERS, "int4 weights by 32": INTEGERS, "half of the weights": PRUNED},
            ("int8",),
            ("int8",),
        ),
    )
}


def wanted(seeds: int) -> Iterator[Cell]:
    """What reads no calibration sample is the same for all seeds."""
    for seed in range(seeds):
        for name in NETWORKS:
            for peer in PEERS.values():
                for form in peer.forms:
                    if peer.python() is not None and (seed == 0 or form in peer.drawn):
                        yield Cell(name, form, peer.name, seed)


def family(cell: Cell) -> str:
    """Of any cell, ours or a peer's."""
    if cell.route in PEERS:
        return PEERS[cell.route].forms[cell.form]
    return (TRAINED_FORMS if cell.route == TRAINED else FORMS)[cell.form].family


def missing() -> list[Peer]:
    return [peer for peer in PEERS.values() if peer.python() is None]


def key(bed: Bed, cell: Cell) -> dict[str, Any]:
    peer = PEERS[cell.route]
    code = hash_files([Path(__file__).parent / f"{one}.py" for one in (peer.module, "common")])
    calibration = bed.key(Cell(cell.network, "float"))
    kept = {name: calibration[name] for name in ("test", "calibration")}
    return {**vars(cell), **kept, "code": code, "version": peer.version()}


def record(bed: Bed, cell: Cell) -> dict[str, Any]:
    """Accuracy of what the peer made and the bytes of its weights and biases, or ``error``: the peer's own text."""
    subject, peer = bed.subject(cell.network), PEERS[cell.route]
    x, y = (torch.cat(part) for part in zip(*items(subject.task.test, "test"), strict=True))
    with tempfile.TemporaryDirectory() as name:
        said = asked(peer, subject, cell, x, bed.root, Path(name))
    if said["error"]:
        return {"error": said["error"]}
    right = (torch.tensor(said["predicted"]) == y).double().mean()
    weights = bed.weights(cell.network) - 4 * said["replaced"] + said["bits"] / 8
    found = {"accuracy": float(right), "samples": len(y), "weights": weights, "layers": said["layers"]}
    return found if said["bytes"] is None else {**found, "file": said["bytes"]}


def asked(peer: Peer, subject: Subject, cell: Cell, x: torch.Tensor, root: Path, folder: Path) -> dict[str, Any]:
    """What its process left as ``result.json``."""
    calibration = torch.cat([part for part, _ in subject.drawn(cell.seed)])
    np.savez(folder / "samples.npz", calibration=calibration.numpy(), test=x.numpy())
    job = {"network": cell.network, "form": cell.form, "root": str(root), "seed": cell.seed}
    (folder / "job.json").write_text(json.dumps(job))
    if cell.form in peer.read:
        example = calibration[:1]
        net = bs.apply(subject.model, bs.Plan({}), [(example, None)]).eval()
        bs.export(net, bs.targets.OnnxRuntime(threads=1), folder / "float.onnx", example)
    command = [str(peer.python()), "-m", f"studies.compression.peers.{peer.module}", str(folder)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {LIMIT_S} s"}
    path = folder / "result.json"
    if not path.is_file():
        return {"error": f"its process ended with {done.returncode}: {done.stderr.strip()[-500:]}"}
    found: dict[str, Any] = json.loads(path.read_text())
    return found
