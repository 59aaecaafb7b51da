"""The examples that enter from Keras and JAX, each by its one command."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "package", "entrances"),
    [("keras_net", "keras", ("keras_module", "keras_onnx")), ("jax_net", "jax2onnx", ("jax",))],
)
def test_it_runs_in_int8_as_well_as_in_float(
    example: str, package: str, entrances: tuple[str, ...], tmp_path: Path
) -> None:
    if find_spec(package) is None:  # not importorskip: keras must not be imported without its backend chosen
        pytest.skip(f'{package} is not installed: pip install "bitsmith[{example[:-4]}]"')
    command = [sys.executable, str(FOLDER / f"{example}.py"), "-o", str(tmp_path), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracies = {kind: re.findall(rf"{kind} +(\S+) % of 360 test digits", done.stdout) for kind in ("float", "int8")}
    assert len(accuracies["float"]) == len(accuracies["int8"]) == len(entrances)
    for before, after in zip(accuracies["float"], accuracies["int8"], strict=True):
        assert float(before) > 80  # it has learned
        assert float(after) > float(before) - 3
    agreement = [float(db) for db in re.findall(r"against its simulation: (\S+) dB", done.stdout)]
    assert len(agreement) == len(entrances)
    assert min(agreement) > 40
    assert done.stdout.count("QLinearConv") == 5 * len(entrances)
    for name in entrances:
        small, large = (tmp_path / f"{name}_{kind}.onnx" for kind in ("int8", "float"))
        assert small.stat().st_size < 0.5 * large.stat().st_size


@pytest.mark.parametrize(
    ("example", "package", "extra"), [("keras_net", "keras", "keras"), ("jax_net", "jax2onnx", "jax")]
)
def test_a_missing_package_gives_the_line_that_installs_it(
    example: str, package: str, extra: str, tmp_path: Path
) -> None:
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.path.insert(0, {str(FOLDER)!r}); "
        f"sys.argv = ['example', '-o', {str(tmp_path)!r}]; "
        f"runpy.run_path({str(FOLDER / (example + '.py'))!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f'pip install "bitsmith[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
