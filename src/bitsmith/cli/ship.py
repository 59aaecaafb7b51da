"""``bitsmith apply``, ``export``, ``verify`` and ``report``: from a plan to a file, and the proof."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, show

if TYPE_CHECKING:
    from torch import nn

    from ..data import Forward
    from ..plan import Plan
    from ..targets.base import Target
    from ..verify import Check


def add(commands: Any) -> None:
    """Add the commands of this file."""
    apply = commands.add_parser("apply", help="simulate a plan in PyTorch and keep the simulated network's state")
    arguments.add_model(apply)
    _add_plan(apply)
    arguments.add_data(apply)
    arguments.add_seed(apply)
    arguments.add_out(apply, "the state, a .safetensors file", "FILE")
    apply.set_defaults(run=run_apply)

    export = commands.add_parser("export", help="write a plan as a file that a runtime reads")
    arguments.add_model(export)
    _add_plan(export)
    arguments.add_data(export)
    arguments.add_target(export)
    arguments.add_batch(export)
    arguments.add_seed(export)
    arguments.add_out(export, "folder for the exported file and the plan as the target needs it")
    export.set_defaults(run=run_export)

    verify = commands.add_parser("verify", help="compare an exported file with its simulation, site by site")
    arguments.add_model(verify)
    verify.add_argument("artifact", type=Path, metavar="ARTIFACT", help="the exported file")
    verify.add_argument("--plan", type=Path, metavar="PLAN", help="instead of the artifact's own")
    arguments.add_data(verify)
    arguments.add_target(verify, required=False)
    verify.add_argument(
        "--tolerance-db",
        type=float,
        metavar="DB",
        help="least agreement of the outputs (onnxruntime 40, else 35)",
    )
    arguments.add_seed(verify)
    verify.set_defaults(run=run_verify)

    report = commands.add_parser("report", help="show a report again, or write it as a page")
    report.add_argument("report", type=Path, metavar="REPORT", help="report.json of an earlier run")
    report.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="write it as .html or .json instead of showing it"
    )
    report.set_defaults(run=run_report)


def _add_plan(parser: Any) -> None:
    parser.add_argument("--plan", required=True, type=Path, metavar="PLAN", help="a plan.json, edited by hand or not")


def run_apply(options: Namespace) -> int:
    from safetensors.torch import save_model

    import bitsmith as bs

    from .._files import atomic_write, check_writable
    from ..model.load import load_calibration, load_model
    from ..plan import Plan

    check_writable(options.out.parent)
    plan = Plan.load(options.plan)
    model = load_model(options.model)
    loader, forward = load_calibration(options.data)
    net = bs.apply(model, plan, loader, forward=forward, seed=options.seed)
    metadata = {"kind": "bitsmith.simulation", "plan": plan.digest(), "seed": str(options.seed)}
    # save_model writes tensors that share memory once
    show.written(atomic_write(options.out, lambda temporary: save_model(net, str(temporary), metadata)))
    show.plain(
        f"This is a simulation: {len(plan)} sites compute what the integers would, in float32, so the file is not "
        "smaller.\nRead it into bitsmith.apply(model, plan, calibration) with safetensors.torch.load_model. "
        "The file that runs small and fast is written by bitsmith export."
    )
    return 0


def run_export(options: Namespace) -> int:
    import bitsmith as bs

    from .._files import check_writable
    from ..bench import suffix
    from ..data import first_inputs
    from ..model.load import load_calibration, load_model
    from ..plan import Plan

    folder = check_writable(options.out)
    given = Plan.load(options.plan)
    target = arguments.target(options.target, options.threads)
    model = load_model(options.model)
    loader, forward = load_calibration(options.data)
    example = first_inputs(loader)
    plan = _adapted(model, given, target, example, forward)
    net = bs.apply(model, plan, loader, forward=forward, seed=options.seed)
    artifact = bs.export(net, target, folder / f"model{suffix(target)}", example, batch=options.batch)
    if plan != given:
        show.plain(f"the plan was adapted to {target.name}: plan.json in {folder} is what was exported")
    show.plain(f"{artifact.mib:.3f} MiB for batch {artifact.batch} on {target.name}")
    show.written(plan.save(folder / "plan.json"), artifact.path)
    return 0


def _adapted(model: nn.Module, plan: Plan, target: Target, example: Any, forward: Forward | None) -> Plan:
    """The plan with what the target needs put in; one that was adapted before comes back as it was."""
    from ..model.network import network

    record = network(model, example, forward=forward, names=plan.sites).record
    plan.check(record)
    return target.adapt(plan, record)


def run_verify(options: Namespace) -> int:
    import bitsmith as bs

    from ..model.load import load_calibration, load_model
    from ..plan import Plan
    from ..targets.base import Artifact

    artifact = Artifact.load(options.artifact)
    target = arguments.target(options.target or artifact.target, options.threads)
    model = load_model(options.model)
    loader, forward = load_calibration(options.data)
    plan = Plan.from_json(artifact.plan) if options.plan is None else Plan.load(options.plan)
    net = bs.apply(model, plan, loader, forward=forward, seed=options.seed)
    check = bs.verify(net, artifact, loader, target=target, tolerance_db=options.tolerance_db, forward=forward)
    print_check(check)
    return 0 if check.passed else 1


def print_check(check: Check) -> None:
    """Every site, the whole network, and the reasons where a site did not run as asked."""

    def number(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
        return "" if value is None else f"{factor * value:.{digits}f}"

    rows = [
        (s.site, s.asked, s.realised, number(s.agree, 2, 100), number(s.gap_db), number(s.sqnr_db), s.why)
        for s in check.sites
    ]
    numbers = ("agree %", "gap dB", "SQNR dB")
    caption = (
        "agree: integers within one step; gap: run against simulation; SQNR: simulation against float\n"
        f"whole network on {check.target}, {check.samples} samples: run against simulation {check.whole_db:.1f} dB "
        f"(at least {check.tolerance_db:.0f}), simulation against float {check.float_db:.1f} dB"
    )
    if check.same_class is not None and check.float_same_class is not None:
        caption += (
            f"\nsame class: run and simulation {100 * check.same_class:.2f} %, "
            f"simulation and float {100 * check.float_same_class:.2f} %"
        )
    show.table(("site", "asked", "realised", *numbers, "why"), rows, numbers, caption)
    show.plain(check.verdict)


def run_report(options: Namespace) -> int:
    from ..report.data import Report
    from ..report.terminal import summary

    report = Report.load(options.report)
    if options.out is None:
        summary(report, show.console())
    else:
        show.written(report.save(options.out))
    return 0
