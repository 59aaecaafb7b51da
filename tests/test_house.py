"""The house rules that a machine can hold: floors, sizes, what importing costs, abstract or final."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitsmith

ROOT = Path(bitsmith.__file__).parent

# From the ground up. A module imports from its own floor and those below it, never from above.
# docs/architecture.md repeats this list.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_files", "_hash", "_lazy", "_memory", "progress", "operations", "site"),
    ("technique", "data", "metrics", "compare", "sequential"),
    ("plan", "training", "task", "store", "numerics", "sampling"),
    ("model",),
    ("prepare",),
    ("sensitivity", "export", "techniques"),
    ("targets",),
    ("chosen", "bench", "deploy", "load", "quantize", "accelerate", "runner"),
    ("costs", "scoring", "profile", "verify", "gradual", "workers"),
    ("search", "evaluate", "report", "learn", "searches", "sensitivities"),
    ("optimize", "explore", "_conformance", "testing", "zoo"),
    ("__init__",),
    ("cli", "__main__"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
RUNTIMES = ("bitsmith.targets.onnxruntime", "bitsmith.targets.openvino", "bitsmith.targets.coreml")
RUNTIMES += ("onnxruntime", "openvino", "coremltools")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """``(line, absolute module or name)`` of every import that can run, those inside functions included."""
    package = ["bitsmith", *path.relative_to(ROOT).parent.parts]

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def own(path: Path) -> Iterator[tuple[int, str]]:
    """As :func:`imported`, for the package's own modules: ``(line, top-level part)``."""
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] == "bitsmith":
            yield line, parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"


def test_every_module_has_a_floor() -> None:
    tops = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert tops == set(FLOOR)


def test_the_page_has_the_same_floors_and_every_module() -> None:
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = re.findall(r"^\d+\. (`.*)$", page, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", line)) for line in floors] == [set(names) for names in reversed(FLOORS)]
    house = page.partition("## The house")[2].partition("\n## ")[0]
    named = {name.partition("/")[0].removesuffix(".py") for name in re.findall(r"`([\w./]+)`", house)}
    assert {name for name in FLOOR if not name.startswith("_")} <= named


@pytest.mark.parametrize("path", FILES, ids=NAMES.values())
def test_imports_go_down(path: Path) -> None:
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for line, other in own(path):
        assert FLOOR[other] <= FLOOR[top], f"{path}:{line}: {top} imports {other}, which is above it"


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    path = ROOT / "model" / "imaginary.py"
    code = (
        "from ..plan import Plan\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx\n"
        "def f():\n    from ..targets import base\n    import openvino as ov\n"
        "from .. import metrics\nfrom .flow import x\n"
    )
    found = [name for _, name in imported_from(code, path)]
    assert found == [
        "bitsmith.plan.Plan",
        "typing.TYPE_CHECKING",
        "bitsmith.targets.base",
        "openvino",
        "bitsmith.metrics",
        "bitsmith.model.flow.x",
    ]


def imported_from(code: str, path: Path) -> list[tuple[int, str]]:
    class Held(type(path)):  # type: ignore[misc]
        def read_text(self, *args: object, **kwargs: object) -> str:
            return code

    return list(imported(Held(path)))


def modules_of(folder: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]


def test_the_model_knows_no_concrete_technique() -> None:
    for path in modules_of("model"):
        assert not [name for _, name in imported(path) if name.startswith("bitsmith.techniques")], path


def test_techniques_know_no_target() -> None:
    for path in modules_of("techniques"):
        assert not [name for _, name in imported(path) if name.startswith("bitsmith.targets")], path


def test_searches_know_no_runtime() -> None:
    for path in modules_of("search"):
        assert not [name for _, name in imported(path) if name.startswith(RUNTIMES)], path


@pytest.mark.parametrize("path", FILES, ids=NAMES.values())
def test_no_file_is_longer_than_600_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


@pytest.mark.parametrize("path", FILES, ids=NAMES.values())
def test_no_pickle_and_no_wildcards(path: Path) -> None:
    names = [name for _, name in imported(path)]
    # no file is pickled; what an executor sends between the processes of one run always is, and `workers` says how
    if path.name != "workers.py":
        banned = ("pickle", "dill", "cloudpickle", "marshal", "shelve")
        assert not [name for name in names if name.split(".")[0] in banned]
    assert not [name for name in names if name.endswith(".*")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("eval", "exec", "os.system", "torch.load"), f"{path}:{node.lineno}: {called}"


def classes() -> dict[str, ast.ClassDef]:
    """Every class of the package by name; a name that two modules use counts as both."""
    found: dict[str, ast.ClassDef] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[f"{NAMES[path]}.{node.name}"] = node
    return found


def is_abstract(node: ast.ClassDef) -> bool:
    bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
    return bool(bases & {"ABC", "Protocol", "NamedTuple", "Exception"}) or any(base.endswith("Error") for base in bases)


def test_what_is_subclassed_is_abstract() -> None:
    every = classes()
    ours = {name.rpartition(".")[2]: node for name, node in every.items()}
    # Cell is the base that techniques' cells are written on: the operation it computes is what a subclass adds
    bases_by_design = {"Cell"}
    wrong = []
    for name, node in every.items():
        for base in node.bases:
            parent = ast.unparse(base).split("[")[0].split(".")[-1]
            if parent in ours and parent not in bases_by_design and not is_abstract(ours[parent]):
                wrong.append(f"{name}({parent})")
    assert not wrong, f"concrete classes are subclassed: {', '.join(wrong)}"


LAZY = (
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "coremltools",
    "scipy",
    "matplotlib",
    "rich",
    "sklearn",
    "jinja2",
    "nncf",
    "optuna",
    "distributed",
)


def test_importing_loads_no_runtime_and_costs_little(tmp_path: Path) -> None:
    """``import bitsmith`` in a fresh process, after torch: the time of the second import and what it brought in.

    The second finds compiled code, as what pip installed does, also where the environment says that none is written.
    """
    code = (
        "import json, sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import bitsmith\n"
        "spent = time.process_time() - start\n"
        "print(json.dumps([spent, sorted({name.split('.')[0] for name in set(sys.modules) - before})]))\n"
    )
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", code]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
        for _ in range(3)
    ]
    assert not set(found[0][1]) & set(LAZY)
    assert min(spent for spent, _ in found) < 0.3, "import bitsmith may cost 0.3 s beyond torch"
