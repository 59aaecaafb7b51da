"""``bitsmith demo``: the main job on real data that needs no download."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, show
from .tune import prepare_store, save_best, written_by_optimize

if TYPE_CHECKING:
    from torch import nn

    from ..task import Task
    from .progress import TerminalProgress

EPOCHS = 6
DROP = 0.01
_BATCH = 32


def add(commands: Any) -> None:
    """Add the command of this file."""
    demo = commands.add_parser("demo", help="train a small network on handwritten digits, then optimize it (2 minutes)")
    demo.add_argument("-o", "--out", type=Path, default=Path("bitsmith-demo"), metavar="DIR", help="(bitsmith-demo/)")
    arguments.add_seed(demo)
    demo.set_defaults(run=run_demo, store=None)


def run_demo(options: Namespace) -> int:
    import bitsmith as bs

    from ..plan import Budget
    from ..report.terminal import summary
    from ..search.base import BudgetError
    from .progress import TerminalProgress

    prepare_store(options, options.out)
    with TerminalProgress() as progress:
        progress.note("about two minutes on two cores; stopped, it goes on where it was")
        task, parts = digits_task(options.seed)
        model = trained(options.out / "digits.safetensors", parts["train"], options.seed, progress)
        try:
            found = bs.optimize(
                model,
                task,
                bs.targets.OnnxRuntime(threads=arguments.default_threads()),
                Budget(drop=DROP),
                folder=options.out,
                store=options.store,
                seed=options.seed,
                progress=progress,
                title="Handwritten digits (scikit-learn), small residual network",
            )
        except BudgetError as error:
            save_best(error, options.out / "plan.json")
            raise
    summary(found.report, show.console())
    show.written(*written_by_optimize(options.out, found.artifact.path))
    show.plain(f"Open {options.out / 'report.html'} in a browser. Your own network: bitsmith optimize --help")
    return 0


def digits_task(seed: int) -> tuple[Task, dict[str, Any]]:
    """The task on the digits, and all four parts of the data."""
    import torch
    import torch.nn.functional as F

    from .. import metrics
    from ..task import Task
    from ..zoo.digits import digits_task_arrays

    parts = digits_task_arrays(seed)

    def batches(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        inputs, classes = map(torch.from_numpy, parts[name])
        return list(zip(torch.split(inputs, _BATCH), torch.split(classes, _BATCH), strict=True))

    task = Task(
        calibration=batches("calibration"),
        validation=batches("validation"),
        test=batches("test"),
        metric=metrics.top1,
        loss=F.cross_entropy,
    )
    return task, parts


def trained(path: Path, data: Any, seed: int, progress: TerminalProgress) -> nn.Module:
    """The network trained with that seed: read from ``path`` if an earlier run left it there, else trained and kept."""
    from safetensors.torch import save_file

    from .._files import atomic_write
    from ..zoo.digits import digits_net, train

    model = digits_net(seed)
    if _read(path, model, seed):
        progress.note(f"the trained network is taken from {path}")
        return model.eval()
    progress.start(f"training on {len(data[0])} images, epochs", EPOCHS)
    model_trained = train(
        model, *data, epochs=EPOCHS, seed=seed, progress=lambda epoch, epochs, loss: progress.advance()
    )
    state = {name: value.contiguous() for name, value in model_trained.state_dict().items()}
    atomic_write(path, lambda temporary: save_file(state, temporary, _label(seed)))
    return model_trained


def _label(seed: int) -> dict[str, str]:
    return {"kind": "bitsmith.demo", "seed": str(seed), "epochs": str(EPOCHS)}


def _read(path: Path, model: nn.Module, seed: int) -> bool:
    """Fill the model from the file; False where there is none that belongs to it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != _label(seed):
                return False
        model.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError):
        return False  # absent, damaged, or of another version: it is trained again
    return True
