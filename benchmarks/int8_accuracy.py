"""What plain int8 costs in accuracy: default ``quantize`` beside the peers, on four trained networks.

    python -m benchmarks.int8_accuracy [--validation] [--resume] [--threads 2] [--only PART]

Everybody gets the same float network and the same calibration samples, and is judged on the same test samples; with
``--validation`` on the validation samples (``int8_defaults`` chooses there). A tool counts with its best variant (least
divergence). Bars, on each network and runtime: not significantly worse than any peer (McNemar's exact test, .05,
Holm-corrected within the network and runtime); mean KL divergence from float <= 1.05 of the best peer's; the mean drop
over the four networks <= 0.3 points. ``w4a8``: 4-bit weights, where the methods separate. ``adaround``, ``gptq``: time.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

import bitsmith as bs
from bitsmith._files import atomic_write
from bitsmith.data import items

from . import harness
from .harness import Benchmark, table
from .int8_peers import FILE_PEERS, Source, silent, write_float
from .int8_tasks import NETWORKS, AnyBits
from .logit_peers import (
    GPTQ,
    GROUP,
    INT8,
    W4A8,
    W4A8_GROUPED,
    LogitPeer,
    Predict,
    Problem,
    arrays,
    built,
    by_sample,
    float_logits,
)
from .paired import divergence, holm, mcnemar, mean_interval, pooled_drop, ratio_interval
from .runtimes import OFF, opened
from .verified import Proof, judge_checks, prove

Array = NDArray[Any]

KL_BAR, DROP_POINTS, ALPHA = 1.05, 0.3, 0.05
RUNS = ("onnxruntime", "openvino")

PARTS = {
    "resnet20": (2.5, 2.5),
    "mobilenet_v1": (7.0, 7.0),
    "ds_cnn": (2.0, 2.0),
    "minilm": (6.0, 6.0),
    "pooled": (0.0, 0.0),
    "w4a8": (40.0, 40.0),
    "adaround": (9.0, 9.0),
    "gptq": (3.5, 3.5),
}


@dataclass
class Judged:
    """Logits of everything on one network, by name, and what they are held against. ``tools``: of the peers."""

    reference: Array
    labels: Array
    logits: dict[str, Array]
    tools: dict[str, str]
    proofs: list[Proof] = field(default_factory=list)

    def right(self, name: str) -> Array:
        found: Array = (self.reference if name == "float" else self.logits[name]).argmax(1) == self.labels
        return found

    def kl(self, name: str) -> Array:
        return divergence(self.reference, self.logits[name])

    def best(self) -> dict[str, str]:
        """Tool -> its variant of least mean divergence."""
        found: dict[str, str] = {}
        for name, tool in self.tools.items():
            if name in self.logits and (tool not in found or self.kl(name).mean() < self.kl(found[tool]).mean()):
                found[tool] = name
        return found


# -- one network -----------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """One network of one run: what was computed is kept on disk, so that ``--resume`` repeats nothing."""

    bench: Benchmark
    name: str
    root: Path
    folder: Path

    def __post_init__(self) -> None:
        network = NETWORKS[self.name]
        self.task = network.task(self.root)
        with silent():
            self.model = network.model(self.root, kept_folder(self.bench))
        batches = [inputs for inputs, _ in items(self.task.calibration, "calibration")]
        first = {k: v[:1] for k, v in batches[0].items()} if isinstance(batches[0], Mapping) else batches[0][:1]
        source = self.folder / "float.onnx"
        write_float(self.model, first, source)
        names = list(first) if isinstance(first, Mapping) else [_input_name(source)]
        feeds = [
            {name: x[i : i + 1] for name, x in zip(names, given, strict=True)}
            for given in map(arrays, batches)
            for i in range(len(given[0]))
        ]
        self.first = first
        self.problem = Problem(
            self.name, self.model, Source(source, feeds, network.heads, network.hidden), batches, self.bench.threads
        )

    @property
    def samples(self) -> Any:
        """The split that is judged."""
        return self.task.validation if self.bench.options.validation else self.task.test

    def labels(self) -> Array:
        return np.concatenate([np.asarray(target) for _, target in items(self.samples, "test")])

    def kept(self, name: str) -> Array | None:
        """What a killed run has left."""
        path = self._path(name)
        if not self.bench.options.resume or not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            found: Array = file["logits"]
        return found

    def run(self, name: str, predict: Predict) -> Array:
        """Logits of all judged samples [n, classes]."""
        found = np.concatenate([predict(inputs) for inputs, _ in items(self.samples, "test")])
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: np.savez(temporary, logits=found))
        return found

    def _path(self, name: str) -> Path:
        return kept_folder(self.bench) / f"{self.name}.{name.replace(' ', '_').replace('/', '_')}.npz"


def kept_folder(bench: Benchmark) -> Path:
    """Logits and heads of a run that is not finished."""
    return harness.RESULTS / f"{bench.name}.{'validation' if bench.options.validation else 'test'}.unfinished"


def _input_name(path: Path) -> str:
    import onnx

    return str(onnx.load(str(path), load_external_data=False).graph.input[0].name)


def ours(session: Session, target: Any, label: str, model: nn.Module, judged: Judged) -> Iterator[tuple[str, Predict]]:
    """Default ``quantize`` for a target: as simulated, and as its file runs; the proof that both are one."""
    net = bs.quantize(model, session.task.calibration, target)
    yield f"{label}, simulated for {target.name}", float_logits(net)
    suffix = ".onnx" if target.name == "onnxruntime" else ".xml"
    path = session.folder / f"{label.replace(' ', '-')}-{target.name}{suffix}"
    artifact = bs.export(net, target, path, session.first, batch=1)
    yield (
        f"{label} in {target.name}",
        by_sample(opened(target.name, artifact.path, session.bench.threads, disabled=OFF)),
    )
    judged.proofs.append(prove(f"{label} in {target.name}", net, artifact, session.task.calibration, target))


def targets(bench: Benchmark) -> Sequence[Any]:
    return bs.targets.OnnxRuntime(threads=bench.threads), bs.targets.OpenVino(threads=bench.threads)


def entrances(session: Session) -> dict[str, Callable[[], nn.Module]]:
    """Label -> the float model as it is entered: as a module, and from the ONNX file that the peers get."""
    found: dict[str, Callable[[], nn.Module]] = {"Bitsmith": lambda: session.model}
    if hasattr(bs, "load"):
        path = session.folder / "entered.onnx"
        write_float(session.model, session.problem.batches[0], path, dynamic=True)
        found["Bitsmith of ONNX"] = lambda: bs.load(path)
    return found


def collect(session: Session, chosen: Sequence[LogitPeer]) -> Judged:
    """Everything's logits on one network."""
    bench = session.bench
    judged = Judged(session.run("float", float_logits(session.model)), session.labels(), {}, {})
    for label, model in entrances(session).items():
        for target in targets(bench):
            names = (f"{label}, simulated for {target.name}", f"{label} in {target.name}")
            left = {name: session.kept(name) for name in names}
            if all(found is not None for found in left.values()):
                judged.logits.update({name: found for name, found in left.items() if found is not None})
                continue
            start = time.perf_counter()
            try:
                for name, predict in ours(session, target, label, model(), judged):
                    judged.logits[name] = session.run(name, predict)
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                bench.miss(f"{label} on {session.name} for {target.name} ({type(error).__name__}: {first})")
                continue
            print(f"{session.name}: {label} for {target.name}, {time.perf_counter() - start:.0f} s", flush=True)
    add_peers(session, judged, chosen)
    return judged


def add_peers(session: Session, judged: Judged, chosen: Sequence[LogitPeer]) -> None:
    for peer in chosen:
        judged.tools[peer.name] = peer.tool
        found = session.kept(peer.name)
        if found is None:
            found = _peer(session, peer)
        if found is None:
            del judged.tools[peer.name]
        else:
            judged.logits[peer.name] = found


def _peer(session: Session, peer: LogitPeer) -> Array | None:
    start = time.perf_counter()
    for made in built(session.problem, session.folder, [peer]):
        if made.value is None:
            print(made.why, flush=True)
            session.bench.row(session.name, name=peer.name, absent=made.absent, why=made.why)
            return None
        found = session.run(peer.name, made.value)
        took = time.perf_counter() - start
        print(f"{session.name}: {peer.name} {peer.version}, {made.seconds:.0f} s to make, {took:.0f} s", flush=True)
        return found
    return None


def plain(bench: Benchmark, name: str) -> None:
    """One network at 8 bits: the table, and the verdicts of each runtime."""
    root = bench.data()
    if root is None:
        return
    with tempfile.TemporaryDirectory(prefix="int8_accuracy-") as folder:
        session = Session(bench, name, root, Path(folder))
        judged = collect(session, [peer for peer in INT8 if fits(peer, session.problem)])
    show(bench, name, f"{name} at 8 bits", judged)
    judge_checks(bench, name, f"{name}: what runs and what was simulated, calibration data", judged.proofs)
    best = judged.best()
    if not best:
        bench.miss(f"{name}: no peer ran")
        return
    leader = min(best.values(), key=lambda peer: judged.kl(peer).mean())
    bench.row(name, leader=leader, counted=sorted(best.values()))
    for mine in [m for m in judged.logits if m.startswith("Bitsmith") and " in " in m]:
        right = judged.right(mine)
        adjusted = holm({peer: mcnemar(right, judged.right(peer)) for peer in best.values()})
        worse = [p for p, value in adjusted.items() if value < ALPHA and right.mean() < judged.right(p).mean()]
        for peer, value in adjusted.items():
            bench.row(name, name=mine, against=peer, mcnemar_holm=value)
        bench.judge(f"{name}: {mine}, peers it is significantly worse than {worse or ''}".rstrip(), len(worse), 0)
        low, high = ratio_interval(judged.kl(mine), judged.kl(leader))
        figure = float(judged.kl(mine).mean() / judged.kl(leader).mean())
        print(f"{name}: KL of {mine} / {leader} = {figure:.3f} ({low:.3f} to {high:.3f})")
        bench.row(name, name=mine, leader=leader, kl_ratio=figure, kl_ratio_low=low, kl_ratio_high=high)
        bench.judge(f"{name}: KL of {mine} / best peer's ({leader})", figure, KL_BAR, "x")
        # for the pooled drop: what is right and what is not, sample by sample
        bench.row(name, name=mine, float_right=_bits(judged.right("float")), right=_bits(right), pooled=True)


def fits(peer: LogitPeer, problem: Problem) -> bool:
    source = next((file for file in FILE_PEERS if file.name == peer.name), None)
    return source is None or source.fits(problem.source)


def _bits(values: Array) -> str:
    return "".join("1" if value else "0" for value in values)


def _array(bits: str) -> Array:
    return np.array([bit == "1" for bit in bits])


def show(bench: Benchmark, part: str, title: str, judged: Judged, settings: Mapping[str, str] | None = None) -> None:
    """One line for each of them, best divergence first."""
    rows = [("float", f"{judged.right('float').mean():.2%}", "", "", "", "")]
    count = len(judged.labels)
    bench.row(part, name="float", accuracy=float(judged.right("float").mean()), samples=count)
    counted = set(judged.best().values())
    for name in sorted(judged.logits, key=lambda n: judged.kl(n).mean()):
        right, kl = judged.right(name), judged.kl(name)
        low, high = mean_interval(kl)
        p = mcnemar(judged.right("float"), right)
        best = "yes" if name in counted else ""
        interval = f"{low:.3g} to {high:.3g}"
        rows.append((name, f"{right.mean():.2%}", f"{p:.2g}", f"{kl.mean():.4g}", interval, best))
        bench.row(
            part,
            name=name,
            tool=judged.tools.get(name, "Bitsmith"),
            accuracy=float(right.mean()),
            samples=count,
            mcnemar_to_float=p,
            kl=float(kl.mean()),
            kl_low=low,
            kl_high=high,
            settings=(settings or {}).get(name, ""),
        )
    split = "validation" if bench.options.validation else "test"
    table(
        f"{title}: {count} {split} samples",
        ("", "accuracy", "p, as float", "KL to float", "95 %", "best of its tool"),
        rows,
    )


def pooled(bench: Benchmark) -> None:
    """The drop over all networks, which one network alone cannot resolve."""
    found: dict[str, dict[str, tuple[Array, Array]]] = {}
    for row in bench.rows:
        if row.get("pooled"):
            found.setdefault(row["name"], {})[row["part"]] = _array(row["float_right"]), _array(row["right"])
    rows = []
    for name, pairs in found.items():
        mean, low, high = pooled_drop(list(pairs.values()))
        points = f"{100 * mean:.2f}"
        rows.append((name, ", ".join(pairs), points, f"{100 * low:.2f} to {100 * high:.2f}"))
        bench.row("pooled", name=name, networks=sorted(pairs), drop=mean, low=low, high=high)
        bench.judge(f"{name}: mean drop over {len(pairs)} networks", 100 * mean, DROP_POINTS, " points")
    if found:
        table("Drop of accuracy, each network counted once", ("", "networks", "points", "95 %"), rows)
    else:
        bench.miss("pooled: no network was measured in this run")


# -- 4-bit weights, and the times of the methods ---------------------------------------------------------------------


def w4a8(bench: Benchmark) -> None:
    """4-bit weights and 8-bit activations, simulated: no CPU runtime has a kernel."""
    root = bench.data()
    if root is None:
        return
    for name in NETWORKS:
        with tempfile.TemporaryDirectory(prefix="int8_accuracy-") as folder:
            session = Session(bench, name, root, Path(folder))
            judged = Judged(session.run("float", float_logits(session.model)), session.labels(), {}, {})
            simulate(session, judged, "Bitsmith W4A8", bs.Int(4, 8))
            add_peers(session, judged, W4A8)
            if session.problem.transformer:
                grouped = bs.Int(4, 8, granularity="group", group=GROUP)
                simulate(session, judged, "Bitsmith W4A8, groups", grouped)
                add_peers(session, judged, W4A8_GROUPED)
        notes = {peer.name: f"activations: {peer.activations}" for peer in (*W4A8, *W4A8_GROUPED)}
        show(bench, "w4a8", f"{name}, 4-bit weights", judged, notes)
        like = [peer.name for peer in (*W4A8, *W4A8_GROUPED) if peer.activations == "8 bits"]
        for mine in ("Bitsmith W4A8", "Bitsmith W4A8, groups"):
            theirs = [n for n in like if n in judged.logits and ("groups" in n) == ("groups" in mine)]
            if theirs and mine in judged.logits:
                leader = min(theirs, key=lambda n: judged.kl(n).mean())
                figure = float(judged.kl(mine).mean() / judged.kl(leader).mean())
                bench.judge(f"{name}: KL of {mine} / best peer's ({leader})", figure, KL_BAR, "x")


def simulate(session: Session, judged: Judged, name: str, technique: Any) -> None:
    """One plan of ours by default, without a runtime."""
    found = session.kept(name)
    if found is None:
        start = time.perf_counter()
        net = applied(session, technique, None)
        seconds = time.perf_counter() - start
        found = session.run(name, float_logits(net))
        print(f"{session.name}: {name}, {seconds:.0f} s to make", flush=True)
        session.bench.row(session.name, name=name, seconds=seconds)
    judged.logits[name] = found


def applied(session: Session, technique: Any, prepared: Sequence[bs.Step] | None) -> nn.Module:
    return bs.quantize(
        session.model, session.task.calibration, AnyBits(session.bench.threads), technique, prepare=prepared
    )


def timed(
    bench: Benchmark,
    part: str,
    net: str,
    label: str,
    techniques: Mapping[str, Any],
    step: Any,
    peers: Sequence[LogitPeer],
) -> None:
    """One method of ours and the peers' own on the same network in the same run: seconds and divergence.

    ``techniques``: by what is added to the method's name; the last one is of the peers' form.
    """
    root = bench.data()
    if root is None:
        return
    with tempfile.TemporaryDirectory(prefix="int8_accuracy-") as folder:
        session = Session(bench, net, root, Path(folder))
        judged = Judged(session.run("float", float_logits(session.model)), session.labels(), {}, {})
        seconds: dict[str, float] = {}
        for added, technique, prepared in [(a, t, p) for a, t in techniques.items() for p in ((step,), ())]:
            name = f"Bitsmith, {label if prepared else 'nearest'}{added}"
            start = time.perf_counter()
            made = applied(session, technique, prepared)
            seconds[name] = time.perf_counter() - start
            print(f"{net}: {name}, {seconds[name]:.0f} s to make", flush=True)
            judged.logits[name] = session.run(f"{part}, {name}", float_logits(made))
        for found in built(session.problem, session.folder, peers):
            peer = found.peer
            if found.value is None:
                print(found.why, flush=True)
                bench.row(part, name=peer.name, absent=found.absent, why=found.why)
                continue
            seconds[peer.name], judged.tools[peer.name] = found.seconds, peer.tool
            judged.logits[peer.name] = session.run(f"{part}, {peer.name}", found.value)
    show(bench, part, f"{label} on {net}", judged, {peer.name: peer.settings for peer in peers})
    table(f"{label} on {net}: time to make", ("", "s"), [(name, f"{value:.0f}") for name, value in seconds.items()])
    for name, value in seconds.items():
        bench.row(part, name=name, seconds=value)
    for added in techniques:
        bench.judge(f"{label}{added} on {net}", seconds[f"Bitsmith, {label}{added}"] / 60, MINUTES[part], " min")
    mine = f"Bitsmith, {label}{list(techniques)[-1]}"
    for leader in judged.best().values():
        figure = float(judged.kl(mine).mean() / judged.kl(leader).mean())
        bench.judge(f"{net}: KL of {mine} / {leader}'s", figure, KL_BAR, "x")


MINUTES = {"adaround": 5.0, "gptq": 2.0}


def adaround(bench: Benchmark) -> None:
    """At 4-bit weights and 8-bit activations, where rounding matters."""
    theirs = [peer for peer in W4A8 if "AdaRound" in peer.name]
    timed(bench, "adaround", "mobilenet_v1", "AdaRound", {"": bs.Int(4, 8)}, bs.AdaRound(), theirs)


def gptq(bench: Benchmark) -> None:
    """At 4-bit weights in groups, float activations: what GPTQ was made for."""
    plain, affine = (
        bs.Int(4, None, granularity="group", group=GROUP, affine_weights=affine) for affine in (False, True)
    )
    timed(bench, "gptq", "minilm", "GPTQ", {"": plain, ", zero points": affine}, bs.Gptq(), GPTQ)


def main(argv: Sequence[str] | None = None) -> int:
    flags = {"validation": "judge on the validation samples: for choosing defaults, never for the final table"}
    bench = Benchmark("int8_accuracy", PARTS, (__doc__ or "").splitlines()[0], flags=flags)
    bench.start(argv)
    if not bench.options.resume:
        shutil.rmtree(kept_folder(bench), ignore_errors=True)
    parts: dict[str, Callable[[Benchmark], None]] = {name: functools.partial(plain, name=name) for name in NETWORKS}
    parts |= {"pooled": pooled, "w4a8": w4a8, "adaround": adaround, "gptq": gptq}
    status = bench.run(parts)
    shutil.rmtree(kept_folder(bench), ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
