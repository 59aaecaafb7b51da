"""What is public: exact names, documented, typed; and no verb touches the user's model."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.testing import MockTarget
from smallnet import batches, small, task

ROOT = Path(bs.__file__).parent
PUBLIC = [(name, getattr(bs, name)) for name in bs.__all__]


def test_all_is_exact() -> None:
    assert list(bs.__all__) == sorted(bs.__all__)
    assert len(set(bs.__all__)) == len(bs.__all__)
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    bound = {
        alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname
    }
    assert bound == set(bs.__all__)
    # submodules appear as attributes once something imports them; nothing else may
    stray = {
        name
        for name, value in vars(bs).items()
        if not name.startswith("_") and name not in bs.__all__ and not isinstance(value, ModuleType)
    }
    assert stray <= {"annotations"}


def test_only_imports_stand_in_the_public_file() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    kinds = {type(node) for node in tree.body[1:]}
    assert kinds <= {ast.ImportFrom, ast.Assign}
    assigned = {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}
    assert assigned == {"__all__", "__version__"}


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=bs.__all__)
def test_every_public_name_is_documented(name: str, value: Any) -> None:
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    assert own, f"bitsmith.{name} has no docstring"
    assert not re.fullmatch(rf"{name}\(.*\)", own, flags=re.DOTALL), f"bitsmith.{name}: dataclass's own docstring"


CLASSES = [(name, value) for name, value in PUBLIC if inspect.isclass(value)]


@pytest.mark.parametrize(("name", "value"), CLASSES, ids=[name for name, _ in CLASSES])
def test_public_methods_are_annotated(name: str, value: type) -> None:
    for method, function in inspect.getmembers(value, inspect.isfunction):
        if not method.startswith("_") and function.__module__.startswith("bitsmith"):
            assert "return" in function.__annotations__, f"{name}.{method}"


def test_it_is_typed_and_the_version_is_one() -> None:
    assert (ROOT / "py.typed").exists()
    project = ROOT.parents[1] / "pyproject.toml"
    if project.exists():
        assert tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] == bs.__version__
    assert importlib.metadata.version("bitsmith") == bs.__version__


# -- never in place ----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """The small network with everything that a careless verb could change: counters, hooks, mixed flags, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()
        self.calls = 0
        self.history: list[int] = []
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(len(x))
        self.seen += 1  # type: ignore[operator]
        logits: Tensor = self.inner(x)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)


def prepared() -> Counting:
    model = Counting()
    model.inner.head(torch.ones(1, 8)).sum().backward()  # a gradient on two parameters
    model.train()
    model.inner.norm.eval()
    model.inner.stem.weight.requires_grad_(False)
    model.inner.left.register_forward_hook(lambda module, args, output: None)
    model.register_forward_pre_hook(lambda module, args: None)
    return model


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a user can see, by identity where identity matters."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            where = f"{path}.{name}"
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    if tensor is None:
                        continue
                    grad = tensor.grad
                    found[f"{where}.{key}"] = (
                        *(id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor._version),
                        *(
                            bytes(tensor.detach().numpy().tobytes()),
                            None if grad is None else (id(grad), grad.tolist()),
                        ),
                    )
            elif name == "_modules":
                found[where] = {key: id(child) for key, child in value.items()}
            elif "hooks" in name:
                found[where] = {key: id(hook) for key, hook in value.items()}
            else:
                found[where] = repr(value)
        found[f"{path}.class"] = type(module)
    return found


TARGET = MockTarget()
PLAN = bs.Plan({"inner.left": bs.Int(4, 8), "inner.right": bs.Int(8, 8)})
INT = bs.Int(8, 8)


def loop(model: nn.Module, folder: Path) -> Any:
    found = bs.profile(model, task(), [INT], TARGET)
    evaluate = bs.evaluator(model, task(), TARGET, folder=folder)
    return bs.search(found, bs.Budget(drop=0.2), evaluate=evaluate)


def shipped(model: nn.Module, folder: Path) -> Any:
    target, data = bs.targets.OnnxRuntime(threads=1), batches(2, seed=2)
    net = bs.apply(model, PLAN, data)
    before = fingerprint_values(net)
    check = bs.verify(net, bs.export(net, target, folder / "net.onnx", data[0][0]), data)
    assert fingerprint_values(net) == before, "export or verify changed the applied network"
    return check


def fingerprint_values(net: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in fingerprint(net).items() if "_interceptor" not in key}


def chosen(model: nn.Module, folder: Path) -> Any:
    times = {("inner.left", technique): 1.0 for technique in (bs.Float(), INT)}
    train, loss = batches(2, seed=2), torch.nn.functional.cross_entropy
    return bs.differentiable_search(model, [bs.Float(), INT], train, batches(2, seed=3), times, loss, steps=2)


def trained(model: nn.Module, folder: Path) -> Any:
    history, loss = bs.History(), torch.nn.functional.cross_entropy
    found = {"ema": 0.5, "reestimate": 1, "validation": task(), "checkpoint": folder / "a.safetensors"}
    return bs.finetune(model, batches(2), loss, steps=2, teacher=model, history=history, **found)


VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "sites": lambda model, folder: bs.sites(model, batches(1)[0][0], inside=True),
    "apply": lambda model, folder: bs.apply(model, PLAN, batches(2)),
    "quantize": lambda model, folder: bs.quantize(model, batches(2)),
    "profile": lambda model, folder: bs.profile(model, task(), [INT], TARGET, sensitivity=bs.loss_rise),
    "profile, search and evaluator": loop,
    "apply, export and verify": shipped,
    "export": lambda model, folder: bs.export(
        model, bs.targets.OnnxRuntime(threads=1), folder / "float.onnx", batches(1)[0][0]
    ),
    "differentiable_search": chosen,
    "finetune": trained,
    "optimize": lambda model, folder: bs.optimize(model, task(), TARGET, bs.Budget(drop=0.2), folder=folder),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_the_users_model_is_bitwise_unchanged(verb: Callable[[nn.Module, Path], Any], tmp_path: Path) -> None:
    model = prepared()
    before = fingerprint(model)
    verb(model, tmp_path)
    after = fingerprint(model)
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} == set()


def test_the_fingerprint_sees_changes() -> None:
    model = prepared()
    for change in (
        lambda: model.eval(),
        lambda: model.inner.head.bias.data.add_(1e-6),
        lambda: model.inner.head.weight.requires_grad_(False),
        lambda: model(torch.zeros(1, 3, 12, 12)),
        lambda: model.inner.right.register_forward_hook(lambda *args: None),
        lambda: setattr(model, "forward", None),
    ):
        before = fingerprint(model)
        change()
        assert fingerprint(model) != before


def test_the_result_keeps_the_models_own_keys_and_attributes() -> None:
    model = prepared()
    net = bs.quantize(model, batches(2, seed=2))
    assert set(model.state_dict()) <= set(net.state_dict())
    assert net.predict(batches(1)[0][0]).shape == (16,)  # type: ignore[operator]
    assert net.training is True
    assert net.inner.norm.training is False  # type: ignore[union-attr]
