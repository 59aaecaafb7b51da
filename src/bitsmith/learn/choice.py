"""Choosing while training: a differentiable choice of one technique by site, with measured latency in the loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Forward, Unlabelled, call, check_loader, device_of, first_inputs, items
from ..model.network import network
from ..model.supernet import SuperNetwork
from ..plan import Plan
from ..profile import Profile
from ..progress import Progress, Silent
from ..site import Site, UnknownSiteError
from ..technique import Technique
from .loader import endless
from .loop import Loss, TrainingError, active_cells, objective, settle, training_mode

Latency = Profile | Mapping[tuple[str, Technique], float]
"""A profile, or ms by (site, technique); ``math.inf`` for what is not to be had."""

_CALIBRATION = 8
"""Training batches that ranges are chosen on, if nothing else is given."""


@dataclass(frozen=True)
class LearnedStep:
    """One step of a search: ``loss`` of one sampled path on a training batch; ``validation``: that of another on a
    validation batch, without latency and decay, None in the warm-up; ``ms``: the expected latency after the step."""

    loss: float
    validation: float | None
    ms: float


@dataclass(frozen=True)
class LearnedPlan:
    """What :func:`differentiable_search` found.

    ``plan``: the likeliest technique of each site. ``net``: the network under it, with the weights that were trained;
    its own plan has what cells settled on. ``probabilities``: by site and technique, summing to 1 at each site. Times
    are sums over the sites of the plan, in the unit of the latency that was given (ms per batch): ``ms`` of the plan,
    ``expected_ms`` under the probabilities, ``reference_ms`` with the first technique at each site.
    """

    plan: Plan
    net: nn.Module = field(repr=False)
    probabilities: Mapping[str, Mapping[Technique, float]] = field(repr=False)
    ms: float
    expected_ms: float
    reference_ms: float
    history: tuple[LearnedStep, ...] = field(repr=False)


def differentiable_search(
    model: nn.Module,
    techniques: Sequence[Technique],
    train: Iterable[Any],
    validation: Iterable[Any],
    latency: Latency,
    loss: Loss,
    *,
    steps: int,
    warmup: int = 0,
    latency_weight: float = 0.1,
    logit_decay: float = 1e-3,
    lr: float = 1e-4,
    logit_lr: float = 0.02,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    calibration: Iterable[Any] | None = None,
    freeze_norms: bool = True,
    forward: Forward | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearnedPlan:
    """Choose one of ``techniques`` for each site while the weights are trained: wiNAS (Fernandez-Marques et al. 2020,
    arXiv:2002.10711) with the gates of ProxylessNAS (Cai et al. 2019, arXiv:1812.00332), for techniques of any kind.

    ``latency``: a :class:`~bitsmith.Profile` (ms of its site rows; edge rows are not counted), or a mapping (site,
    technique) -> ms, where ``math.inf`` says that the target does not offer it. Decided are the sites it names; each
    may have those of ``techniques`` that fit it and have a finite time. A site with one keeps it, a site that is not
    named stays as it is.

    All techniques of a site share its weights; what their cells learn besides is their own. A site has logits a, 0 at
    the start, and p = softmax(a). Each of ``steps`` steps does two things:

    1. One technique by site is drawn from p, and the weights follow ``loss(output, target)`` and the cells' penalties
       on a batch of ``train``: Adam and half a cosine, or ``optimizer(parameters)``, as in :func:`~bitsmith.finetune`.
    2. The logits follow ``loss + logit_decay * |a|^2 + latency_weight * E[T] / T1`` on a batch of ``validation``, in
       eval. E[T] is the sum over sites and techniques of p_i T_i, T1 the ms with the first technique of ``techniques``
       at each site (the first it has): both have the same unit, so ``latency_weight`` is in units of the loss.

    The gradient of the loss by the logits is that of two sampled paths: at each site i and j are drawn from p without
    repetition, q = softmax(a_i, a_j), one of the two is drawn from q and alone computes the output. With the gates g
    of the outputs o, y = sum_k g_k o_k, ``dL/da_i = sum_k dL/dg_k q_k (delta_ik - q_i) = q_i q_j <dL/dy, o_i - o_j>``,
    and the opposite for j (arXiv:1812.00332, eq. 4 for two paths). Their rescaling of the two logits after the step is
    left out, as E[T] moves all. Weights get no gradient here, and one difference of outputs is kept by site.
    The logits follow Adam without momentum, so one moves by up to about ``logit_lr`` a step.

    ``warmup``: steps of the first kind alone, with every technique equally likely, before the others. ``calibration``:
    what ranges are chosen on, 8 batches of ``train`` by default. ``validation`` must hold other samples than ``train``.
    ``freeze_norms``, ``forward``, ``seed``, ``progress``: as in :func:`~bitsmith.finetune`. The same seed gives the
    same result; torch's global generator and ``model`` stay as they were. Ranges of ``Int`` are those of the weights
    at the start: begin with a trained model, and go on with ``finetune(found.net, ...)``.

    Raises ``ValueError`` for ``steps`` below 1, one loader for both roles, a technique without a time at a site that it
    fits, no site with two techniques; ``UnknownSiteError``; :class:`TrainingError` where a loss is not finite.
    """
    if steps < 1 or warmup < 0:
        raise ValueError(
            f"differentiable_search(steps={steps}, warmup={warmup}): at least 1 step, and no warmup below 0"
        )
    if _loader(train) is _loader(validation):
        raise ValueError(
            "differentiable_search: train and validation are the same loader, so that the choice would follow what the "
            "weights have learned by heart; split the data, such as by torch.utils.data.random_split"
        )
    check_loader(validation, "validation", fixed_order=False)
    progress = progress or Silent()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        named = dict.fromkeys(site for site, _ in _rows(latency))
        net = network(model, first_inputs(train, "training"), forward=forward, names=named)
        table = _table(latency, techniques, net.record.sites)
        seen = calibration
        if seen is None:
            seen = list(itertools.islice(items(train, "training"), _CALIBRATION))
        paths = SuperNetwork(net, {site: [*row] for site, row in table.items()}, seen, seed=seed)
        choice = _Choice(table, device_of(paths.module), seed)
        history = _search(
            *(paths, choice, endless(train), endless(validation, "validation"), loss, steps, warmup),
            *(_optimizer(paths, lr, optimizer, steps + warmup), logit_lr, logit_decay, latency_weight),
            *(freeze_norms, forward, progress),
        )
    plan = choice.likeliest()
    found = paths.finish(plan)
    found.zero_grad()
    settle(found)
    return LearnedPlan(
        plan,
        found.train(model.training),
        choice.probabilities(),
        sum(table[site][technique] for site, technique in plan.sites.items()),
        float(choice.expected_ms().detach()),
        choice.reference_ms,
        history,
    )


class _Choice:
    """The logits of each site, and what is drawn from them."""

    def __init__(self, table: Mapping[str, Mapping[Technique, float]], device: torch.device | None, seed: int) -> None:
        self.options = {site: [*row] for site, row in table.items()}
        self.ms = {
            site: torch.tensor([*row.values()], dtype=torch.float32, device=device) for site, row in table.items()
        }
        self.logits = {
            site: nn.Parameter(torch.zeros(len(row), device=device)) for site, row in table.items() if len(row) > 1
        }
        self.reference_ms = sum(next(iter(row.values())) for row in table.values())
        self.generator = torch.Generator().manual_seed(seed)

    def path(self) -> Plan:
        """One technique by site, drawn from the probabilities."""
        return Plan({site: row[self._two(site)[0]] for site, row in self.options.items()})

    def pair(self) -> tuple[Plan, dict[str, tuple[Technique, Tensor]]]:
        """A path, and by site another technique with the gate through which the loss reaches the logits."""
        sites: dict[str, Technique] = {}
        others: dict[str, tuple[Technique, Tensor]] = {}
        for site, row in self.options.items():
            if site not in self.logits:
                sites[site] = row[0]
                continue
            two = self._two(site)
            among = torch.softmax(self.logits[site][two], 0)
            active = int(torch.rand((), generator=self.generator) >= float(among.detach()[0]))
            gate = among[active]
            sites[site], others[site] = row[two[active]], (row[two[1 - active]], gate - gate.detach())
        return Plan(sites), others

    def _two(self, site: str) -> list[int]:
        """Two options drawn without repetition (one where there is no other): the first is drawn from the
        probabilities. The greatest logits after noise of Gumbel's distribution, for probabilities that round to 0."""
        if site not in self.logits:
            return [0]
        logits = self.logits[site].detach().cpu().double()
        uniform = torch.rand(logits.shape, generator=self.generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return [int(k) for k in (logits + noise).topk(2).indices]

    def expected_ms(self) -> Tensor:
        """``sum over sites and techniques of softmax(a)_i T_i``, shape ()."""
        return torch.stack([self._softmax(site) @ ms for site, ms in self.ms.items()]).sum()

    def cost(self, decay: float, weight: float) -> Tensor:
        """The terms of the loss that are functions of the logits alone."""
        squares = torch.stack([logits.square().sum() for logits in self.logits.values()]).sum()
        return decay * squares + weight * self.expected_ms() / self.reference_ms

    def likeliest(self) -> Plan:
        best = {site: int(self._softmax(site).argmax()) for site in self.options}
        return Plan({site: row[best[site]] for site, row in self.options.items()})

    def probabilities(self) -> dict[str, dict[Technique, float]]:
        return {site: dict(zip(row, self._softmax(site).tolist(), strict=True)) for site, row in self.options.items()}

    def _softmax(self, site: str) -> Tensor:
        logits = self.logits.get(site)
        return torch.ones_like(self.ms[site]) if logits is None else torch.softmax(logits, 0)


def _search(
    paths: SuperNetwork,
    choice: _Choice,
    train: Iterable[tuple[Any, Any]],
    validation: Iterable[tuple[Any, Any]],
    loss: Loss,
    steps: int,
    warmup: int,
    trainer: tuple[torch.optim.Optimizer, Any],
    logit_lr: float,
    logit_decay: float,
    latency_weight: float,
    freeze_norms: bool,
    forward: Forward | None,
    progress: Progress,
) -> tuple[LearnedStep, ...]:
    """The alternation; the weights and logits are trained in place."""
    weights, schedule = trainer
    logits = [*choice.logits.values()]
    # momentum would go on moving logits by a gradient that was sampled for others
    chooser = torch.optim.Adam(logits, logit_lr, betas=(0.0, 0.999))
    net, device = paths.module, device_of(paths.module)
    others, total_steps = iter(validation), steps + warmup
    history = []
    progress.start("choosing and training", total_steps)
    for done, (inputs, target) in zip(range(total_steps), train, strict=False):
        where = f"at step {done + 1} of {total_steps}"
        for cell in paths.cells.values():
            cell.step(done, total_steps)
        paths.put(choice.path())
        paths.set_mode(lambda module: training_mode(module, freeze_norms))
        total = objective(call(net, inputs, forward), target, loss, active_cells(net), device)
        _check(total, f"training loss is {float(total.detach())} {where}; a smaller lr may help")
        weights.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        weights.step()
        if schedule is not None:
            schedule.step()
        seen = None
        if done >= warmup:
            inputs, target = next(others)
            paths.put(*choice.pair())
            paths.set_mode(nn.Module.eval)
            judged = objective(call(net, inputs, forward), target, loss, [], device)
            _check(judged, f"validation loss is {float(judged.detach())} {where}; leave out a technique that breaks it")
            found = torch.autograd.grad(judged + choice.cost(logit_decay, latency_weight), logits)
            for parameter, gradient in zip(logits, found, strict=True):
                parameter.grad = gradient
            chooser.step()
            seen = float(judged.detach())
        history.append(LearnedStep(float(total.detach()), seen, float(choice.expected_ms().detach())))
        progress.advance()
    return tuple(history)


def _optimizer(
    paths: SuperNetwork,
    lr: float,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    steps: int,
) -> tuple[torch.optim.Optimizer, Any]:
    parameters = paths.parameters()
    if not parameters:
        raise TrainingError("differentiable_search: no parameter of the network requires a gradient")
    if optimizer is not None:
        return optimizer(parameters), None
    chosen = torch.optim.Adam(parameters, lr)
    return chosen, torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)


def _check(total: Tensor, problem: str) -> None:
    if not bool(total.isfinite()):
        raise TrainingError(f"differentiable_search: the {problem}")


def _loader(loader: Any) -> Any:
    return loader.loader if isinstance(loader, Unlabelled) else loader


def _rows(latency: Latency) -> dict[tuple[str, Technique], float]:
    """ms by (site, technique), infinite where the target refused."""
    if not isinstance(latency, Profile):
        return dict(latency)
    if latency.groups:
        raise ValueError("differentiable_search: sites of this profile share one decision, which it does not do here")
    return {(row.site, row.technique): math.inf if row.refused else row.ms for row in latency.rows}


def _table(
    latency: Latency, techniques: Sequence[Technique], sites: Mapping[str, Site]
) -> dict[str, dict[Technique, float]]:
    """What may be chosen: ms by site, in the order of the network, and technique, in the order given."""
    rows = _rows(latency)
    unknown = next((site for site, _ in rows if site not in sites), None)
    if unknown is not None:
        raise UnknownSiteError(unknown, sites)
    named = {site for site, _ in rows}
    table: dict[str, dict[Technique, float]] = {}
    for name, site in sites.items():
        for technique in dict.fromkeys(techniques) if name in named else ():
            if not technique.fits(site):
                continue
            ms = rows.get((name, technique), math.nan)
            if math.isnan(ms):
                raise ValueError(
                    f"differentiable_search: no latency of {technique} at {name!r}, which it fits; measure it by "
                    "bs.profile(model, task, techniques, target), or give math.inf to leave it out there"
                )
            if math.isfinite(ms):
                table.setdefault(name, {})[technique] = float(ms)
    if not any(len(row) > 1 for row in table.values()):
        raise ValueError(
            f"differentiable_search: no site has two of {', '.join(map(str, techniques)) or 'no techniques'} to choose "
            f"from; the latency names {len(named)} sites. Techniques must fit, and have a finite time"
        )
    if sum(next(iter(row.values())) for row in table.values()) <= 0:
        raise ValueError("differentiable_search: the first technique of each site takes 0 ms or less in all")
    return table
