"""Builds the environment that a peer tuner runs in: ``python -m benchmarks.peers.environment NAME FOLDER``.

NAME: nncf and aimet (one and the same: the extra ``peers``), neural_compressor, modelopt or mct. A folder that already
holds what is asked for is left as it is. Says what failed and ends with 1 if it cannot be built.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "bitsmith-peers.txt"


@dataclass(frozen=True)
class Environment:
    """``pins``: take the place of the repository's constraints on the same packages. ``imports``: have to succeed."""

    requirements: Sequence[str]
    imports: Sequence[str]
    tuners: Sequence[str]
    pins: Sequence[str] = ()


PEERS = Environment(
    requirements=("-e", f"{ROOT}[peers,openvino]"),
    imports=("nncf", "openvino", "aimet_onnx"),
    tuners=("nncf_accuracy_control", "nncf_accuracy_control_onnx", "aimet_amp"),
)

ENVIRONMENTS: Mapping[str, Environment] = {
    "nncf": PEERS,
    "aimet": PEERS,
    # the last release with the accuracy-aware tuning of ONNX files asks for numpy 1, and reads the ONNX of its time
    "neural_compressor": Environment(
        requirements=("torch", "neural-compressor==2.6", "onnx", "onnxruntime", "setuptools", "six"),
        pins=("neural-compressor==2.6", "numpy<2", "onnx==1.16.2", "onnxruntime==1.19.2", "setuptools<81"),
        imports=("neural_compressor.quantization",),
        tuners=("neural_compressor_autotune",),
    ),
    "modelopt": Environment(
        requirements=("-e", f"{ROOT}[text]", "nvidia-modelopt==0.47.0", "requests", "huggingface_hub"),
        imports=("modelopt.torch.quantization",),
        tuners=("modelopt_auto_quantize",),
    ),
    "mct": Environment(
        requirements=("-e", f"{ROOT}[text]", "model-compression-toolkit==2.6.1"),
        pins=("matplotlib<3.10",),
        # MCT itself asks for a torchvision, which its tuner stands in for: the CPU one of this torch does not import
        imports=("mct_quantizers", "networkx", "pulp"),
        tuners=("mct_mixed_precision",),
    ),
}


def package(requirement: str) -> str:
    """The normalised name that a requirement or a constraint is about; empty for a comment."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement.split("#")[0].strip())
    return re.sub(r"[-_.]+", "-", found.group()).lower() if found else ""


def constraints(lines: Iterable[str], pins: Sequence[str]) -> list[str]:
    """The repository's constraints with ``pins`` in the place of those on the same packages."""
    replaced = {package(pin) for pin in pins}
    return [line for line in lines if (name := package(line)) and name not in replaced] + list(pins)


def build(environment: Environment, folder: Path) -> None:
    """Raises ``subprocess.CalledProcessError`` where a step fails; its output has gone to the terminal."""
    pinned = constraints((ROOT / "constraints.txt").read_text().splitlines(), environment.pins)
    wanted = "\n".join((*environment.requirements, *pinned))
    mark, python = folder / MARK, folder / "bin" / "python"
    if mark.is_file() and mark.read_text() == wanted:
        return
    if not python.is_file():
        venv.create(folder, with_pip=True)
    file = folder / "constraints.txt"
    file.write_text("\n".join(pinned) + "\n")
    command = [str(python), "-m", "pip", "install", "-q", "-c", str(file), *environment.requirements]
    subprocess.run(command, check=True, cwd=ROOT)
    statement = "import " + ", ".join(environment.imports)
    subprocess.run([str(python), "-c", statement], check=True, cwd=folder)
    mark.write_text(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(ENVIRONMENTS))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    environment = ENVIRONMENTS[asked.name]
    try:
        build(environment, asked.folder.resolve())
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"{asked.name}: not built in {asked.folder}: {error}", file=sys.stderr)
        return 1
    print(f"{asked.name}: {asked.folder / 'bin' / 'python'} runs {', '.join(environment.tuners)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
