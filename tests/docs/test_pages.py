"""What README and docs show is true: commands parse, Python runs, the table is what the targets say."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.cli.main import parser
from bitsmith.testing import check_technique

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    'pip install -c constraints.txt ".[demo]" && bitsmith demo',
    'pip install -c constraints.txt -e ".[test]" && pytest',
)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"of_docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(x) + x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the pages use without making them, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Net().eval()

    def loader(seed: int) -> list[tuple[Tensor, Tensor]]:
        x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return [(x, model(x).argmax(1))]

    names = {"model": model, "calib": loader(1), "val": loader(2), "test": loader(3), "example": loader(1)[0][0]}
    return {"__name__": "page", **names}


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_has_the_two_commands_as_whole_lines_in_blocks_of_their_own(command: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n```\n{command}\n```\n" in readme


def test_readme_python_runs(given: dict[str, Any], tmp_path: Path) -> None:
    for code in blocks(ROOT / "README.md", "python"):
        exec(compile(code, "README.md", "exec", dont_inherit=True), given)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"plan.json", "model.onnx", "report.html", "report.json"} <= written
    assert (tmp_path / "quantized.onnx").exists()
    assert given["result"].report.samples == 16
    assert bs.plan_of(given["net"]).sites == {"head": given["Ternary"]()}


def test_readme_ternary_computes_what_the_example_does(given: dict[str, Any]) -> None:
    code = next(code for code in blocks(ROOT / "README.md", "python") if "class Ternary" in code)
    exec(compile(code, "README.md", "exec", dont_inherit=True), given)
    example = load(ROOT / "examples" / "ternary.py")
    check_technique(given["Ternary"](), kinds=["conv2d", "linear"], settings=1)
    shown, full = (
        bs.apply(given["model"], bs.Plan(dict.fromkeys(("conv", "head"), kind())), given["calib"])
        for kind in (given["Ternary"], example.Ternary)
    )
    x = given["example"]
    with torch.no_grad():
        torch.testing.assert_close(shown(x), full(x))
        assert not torch.allclose(shown(x), given["model"](x))


def test_readme_table_is_what_the_targets_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert load(ROOT / "docs" / "support.py").replaced(readme) == readme, "write it again: python docs/support.py"


def test_picture_is_what_its_script_draws() -> None:
    picture = ROOT / "docs" / "_static" / "pipeline.svg"
    assert load(ROOT / "docs" / "pipeline.py").svg() == picture.read_text(encoding="utf-8")


# torch's exporter warns of its own code
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
@pytest.mark.parametrize(
    "page",
    [
        "start.md",
        "how-to-choose.md",
        "search.md",
        "frameworks.md",
        "post_training.md",
        "winograd.md",
        "training.md",
        "learned_precision.md",
        "sparse_paths.md",
        "compression.md",
        "binary.md",
        "modelled_hardware.md",
        "generated_weights.md",
        "adder.md",
    ],
)
def test_python_of_the_pages_runs(page: str, given: dict[str, Any]) -> None:
    found = blocks(ROOT / "docs" / page, "python")
    assert found
    for code in found:
        exec(compile(code, page, "exec", dont_inherit=True), given)


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_python_of_the_page_on_graphs_runs(given: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torch.jit.script when it is imported
        pytest.importorskip("torch_geometric", reason='needs PyTorch Geometric: pip install "bitsmith[graphs]"')
    for code in blocks(ROOT / "docs" / "graphs.md", "python"):
        exec(compile(code, "graphs.md", "exec", dont_inherit=True), given)
    assert set(given["plan"].sites) == {
        f"{layer}{site}" for layer in ("first", "second") for site in (".lin", ":mul.2", ".aggr_module")
    }


def test_figures_of_winograd_are_what_its_page_measures(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = [code for code in blocks(ROOT / "docs" / "winograd.md", "python") if "decibels" in code]
    exec(compile("import torch\nimport bitsmith as bs\n" + code, "winograd.md", "exec", dont_inherit=True), given)
    text = (ROOT / "docs" / "winograd.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `(\w+\(.*\))` \| ([\d.]+) \([\d.]+ to [\d.]+\) \|$", text, re.MULTILINE))
    found = dict(re.findall(r"^(\w+\(.*\)): ([\d.]+) dB", capsys.readouterr().out, re.MULTILINE))
    assert len(found) == 5
    assert {name: float(db) for name, db in said.items()} == pytest.approx(
        {name: float(db) for name, db in found.items()}, abs=0.15
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = [line for block in blocks(page, "") for line in block.splitlines()]
    # in running text a verb may stand without its arguments
    shown += [
        line for line in re.findall(r"`(bitsmith [^`\n]+)`", text) if len(line.split()) > 2 and "--help" not in line
    ]
    for line in shown:
        if line.startswith("bitsmith "):
            parser().parse_args([word.replace("NAME", "onnxruntime") for word in shlex.split(line)[1:]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_on_the_pages_exist(page: Path) -> None:
    for dotted in re.findall(r"\bbs\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)", page.read_text(encoding="utf-8")):
        found: Any = bs
        for part in dotted.split("."):
            assert hasattr(found, part), f"{page.name}: bs.{dotted}"
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = set(re.findall(r"automodule:: (\S+)", page))
    single = set(re.findall(r"auto(?:function|class|exception):: bitsmith\.(\w+)$", page, re.MULTILINE))
    public = {name: getattr(bs, name) for name in bs.__all__}
    missing = {
        name
        for name, value in public.items()
        if name not in single and not isinstance(value, ModuleType) and value.__module__ not in modules
    }
    assert not missing
