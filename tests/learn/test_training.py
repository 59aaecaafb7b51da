"""The parts of a training: its optimizer, what is averaged, what is kept, and all of it together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bitsmith as bs
from bitsmith.learn.averaging import MovingAverage
from bitsmith.learn.norms import reestimate_norms
from bitsmith.learn.state import copied, put, tensors_of, with_values
from bitsmith.learn.validation import Validation
from bitsmith.model.apply import computer_of
from smallnet import Batch, batches, small, task
from training_jobs import Notes


def sgd(lr: float = 0.05) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr)


def close(a: nn.Module, b: nn.Module, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    theirs = tensors_of(b)
    for name, value in tensors_of(a).items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def equal(a: nn.Module, b: nn.Module) -> bool:
    theirs = tensors_of(b)
    return all(torch.equal(value, theirs[name]) for name, value in tensors_of(a).items())


# -- optimizer and schedule --------------------------------------------------------------------------------------------


def test_a_schedule_is_stepped_after_each_step() -> None:
    history = bs.History()
    given: list[int] = []

    def halved(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        given.append(steps)
        return LambdaLR(optimizer, lambda step: 0.5**step)

    bs.finetune(
        *(small(steps=5), batches(2), F.cross_entropy), steps=4, optimizer=sgd(0.1), schedule=halved, history=history
    )
    assert given == [4]
    assert [step.lr for step in history] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_the_default_is_adam_and_half_a_cosine() -> None:
    history, ours = bs.History(), small(steps=5)
    trained = bs.finetune(
        ours, batches(3), F.cross_entropy, steps=6, lr=0.01, history=history, freeze_norms=False, seed=1
    )
    assert [s.lr for s in history] == pytest.approx([0.01 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)])
    theirs = small(steps=5).train()
    optimizer = torch.optim.Adam(theirs.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for x, y in 2 * batches(3):
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
        schedule.step()
    assert equal(trained, theirs.eval())


def test_groups_have_options_of_their_own_and_keep_the_seed_of_the_rest() -> None:
    net = bs.apply(small(steps=5), bs.Plan({"left": bs.Winograd(4, transforms="flex")}), batches(1))
    seen: list[Any] = []

    def make(groups: list[Any]) -> torch.optim.Optimizer:
        seen.extend(groups)
        return torch.optim.SGD(groups, 0.1)

    groups = {"_bitsmith.*": {"lr": 0.0}, "head.bias": {"lr": 0.0}, "head.*": {"weight_decay": 0.5}}
    trained = bs.finetune(net, batches(2), F.cross_entropy, steps=2, optimizer=make, groups=groups)
    names = [[next(n for n, q in net.named_parameters() if q.shape == p.shape) for p in g["params"]] for g in seen]
    assert [len(group) for group in names] == [3, 1, 1, len(list(net.parameters())) - 5]
    assert seen[2]["weight_decay"] == 0.5
    before, after = dict(net.named_parameters()), dict(trained.named_parameters())
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("_bitsmith.")} | {"head.bias"} == still


def test_groups_that_name_nothing_or_what_is_frozen_say_so() -> None:
    model = small(steps=1)
    with pytest.raises(bs.TrainingError, match=r"no parameter matches the group 'hed\.weight'; names are such as head"):
        bs.finetune(model, batches(1), F.cross_entropy, steps=1, groups={"hed.weight": {"lr": 0.1}})
    model.head.requires_grad_(False)
    with pytest.raises(bs.TrainingError, match=r"the group 'head\.\*' names frozen parameters only: head\.weight"):
        bs.finetune(model, batches(1), F.cross_entropy, steps=1, groups={"head.*": {"lr": 0.1}})


def test_an_optimizer_that_cannot_train_this_network_is_refused() -> None:
    model, data = small(steps=1), batches(1)

    def run(optimizer: Any, **changes: Any) -> None:
        bs.finetune(model, data, F.cross_entropy, steps=1, optimizer=optimizer, **changes)

    with pytest.raises(bs.TrainingError, match="holds 9 parameters that are not of the network that is trained"):
        run(lambda parameters: torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(bs.TrainingError, match="ReduceLROnPlateau waits for a score"):
        run(sgd(), schedule=lambda optimizer, steps: ReduceLROnPlateau(optimizer))


def test_nothing_to_train_says_what_is_frozen() -> None:
    model, data = small(steps=1), batches(1)
    model.requires_grad_(False)
    with pytest.raises(bs.TrainingError, match=r"all 9 are frozen \(stem\.weight, .*Thaw some"):
        bs.finetune(model, data, F.cross_entropy, steps=1)
    net = bs.apply(model, bs.Plan({"left": bs.Int(8, 8), "right": bs.Int(4, 4)}), data)
    with pytest.raises(bs.TrainingError, match="none of the 2 sites of its plan has one"):
        bs.finetune(net, data, F.cross_entropy, steps=1)
    with pytest.raises(bs.TrainingError, match="depends on no parameter that requires a gradient"):
        bs.finetune(small(steps=1), data, lambda output, y: output.detach().sum(), steps=1)
    with pytest.raises(bs.TrainingError, match=r"one number was expected.*reduction='mean'"):
        bs.finetune(small(steps=1), data, lambda o, y: F.cross_entropy(o, y, reduction="none"), steps=1)


def test_parameters_that_no_gradient_reaches_are_told_of() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.used(x)
            return logits

    notes: list[str] = []
    model, data = Idle(), [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))]
    trained = bs.finetune(model, data, F.cross_entropy, steps=2, lr=0.1, progress=Notes(notes))
    assert notes == ["no gradient reaches 2 of 4 parameters, which stay as they are: idle.weight, idle.bias"]
    assert torch.equal(trained.idle.weight, model.idle.weight)


# -- accumulation, clipping, precision ---------------------------------------------------------------------------------


def joined(data: list[Batch], by: int) -> list[Batch]:
    return [
        (torch.cat([x for x, _ in data[i : i + by]]), torch.cat([y for _, y in data[i : i + by]]))
        for i in range(0, len(data), by)
    ]


@pytest.mark.parametrize("by", [2, 3])
def test_accumulated_batches_are_one_large_one(by: int) -> None:
    """A loss that is a mean, normalisations that are frozen; 8 bits, as one level more or less moves a gradient."""
    net = bs.apply(small(steps=5), bs.Plan({"left": bs.Int(8, 8)}), batches(1))
    data, histories = batches(6, size=8), (bs.History(), bs.History())
    several = bs.finetune(
        net, data, F.cross_entropy, steps=4, accumulate=by, optimizer=sgd(), clip_norm=0.5, history=histories[0]
    )
    one = bs.finetune(
        net, joined(data, by), F.cross_entropy, steps=4, optimizer=sgd(), clip_norm=0.5, history=histories[1]
    )
    close(several, one, rtol=1e-4)
    assert histories[0].losses == pytest.approx(histories[1].losses, rel=1e-5)
    assert [s.gradient for s in histories[0]] == pytest.approx([s.gradient for s in histories[1]], rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(limit=st.floats(1e-3, 10.0))
def test_gradients_are_scaled_down_to_the_norm(limit: float) -> None:
    """One step of SGD moves by lr times the clipped gradient."""
    torch.manual_seed(0)
    model, history = nn.Linear(6, 3), bs.History()
    data = [(torch.randn(8, 6), torch.randint(0, 3, (8,)))]
    trained = bs.finetune(model, data, F.cross_entropy, steps=1, optimizer=sgd(1.0), clip_norm=limit, history=history)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    grads = [p.grad.double() for p in model.parameters()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert history[0].gradient == pytest.approx(norm, rel=1e-5)
    for before, after, grad in zip(model.parameters(), trained.parameters(), grads, strict=True):
        expected = before.detach().double() - grad * min(1.0, limit / norm)
        torch.testing.assert_close(after.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_runs_the_network_and_not_the_loss() -> None:
    kinds: list[torch.dtype] = []
    inside: list[torch.dtype] = []

    class Seen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            inside.append(output.dtype)
            return output

    def loss(output: Tensor, target: Tensor) -> Tensor:
        kinds.append(output.dtype)
        return F.cross_entropy(output, target)

    torch.manual_seed(0)
    model = nn.Sequential(Seen(5, 16), nn.ReLU(), Seen(16, 3))
    x, y = torch.randn(64, 5), torch.randint(0, 3, (64,))
    history = bs.History()
    given: dict[str, Any] = {"steps": 40, "lr": 0.02, "teacher": model, "history": history}
    trained = bs.finetune(model, [(x, y)], loss, precision="bfloat16", **given)
    assert set(kinds) == {torch.float32}
    assert set(inside) == {torch.bfloat16}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert history.losses[-1] < history.losses[0]
    exact = bs.History()
    bs.finetune(model, [(x, y)], F.cross_entropy, steps=40, lr=0.02, teacher=model, history=exact)
    assert history.losses != exact.losses
    assert history.losses == pytest.approx(exact.losses, rel=0.02)


def test_bfloat16_trains_under_a_plan() -> None:
    plan = bs.Plan({"left": bs.Winograd(2), "right": bs.Int(4, 8), "head": bs.Int(8, 8)})
    net, history = bs.apply(small(steps=5), plan, batches(2)), bs.History()
    bs.finetune(net, batches(4), F.cross_entropy, steps=30, lr=5e-3, precision="bfloat16", history=history)
    assert sum(history.losses[-4:]) < 0.8 * sum(history.losses[:4])


# -- averages and norms ------------------------------------------------------------------------------------------------


def test_the_moving_average_is_that_of_torch() -> None:
    model = small(steps=5).train()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    ours = MovingAverage(0.7)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in batches(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        theirs.update_parameters(model)
        ours.update(model)
    averaged = tensors_of(theirs.module)
    for name, value in ours.values.items():
        # theirs also averages counts, and rounds them
        expected = averaged[name] if value.is_floating_point() else tensors_of(model)[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"ema=1\.0"):
        MovingAverage(1.0)


def test_what_comes_back_is_the_average_by_its_formula() -> None:
    model, data = small(steps=5), batches(3)
    net = bs.apply(model, bs.Plan({"left": bs.Int(8, 8), "right": bs.Winograd(2)}), data)
    weights = []
    for steps in (1, 2, 3):
        weights.append(
            bs.finetune(net, data, F.cross_entropy, steps=steps, optimizer=sgd()).stem.weight.detach().double()
        )
    averaged = bs.finetune(net, data, F.cross_entropy, steps=3, optimizer=sgd(), ema=0.6).stem.weight.detach().double()
    expected = 0.6 * (0.6 * weights[0] + 0.4 * weights[1]) + 0.4 * weights[2]
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-7)


def test_reestimated_statistics_are_those_of_torch_on_an_ordinary_model() -> None:
    ours, theirs, data = small(steps=5), small(steps=5), batches(4, seed=9)
    reestimate_norms(ours, [x for x, _ in data])
    update_bn([x for x, _ in data], theirs)
    assert equal(ours, theirs)
    assert not ours.training


@pytest.mark.parametrize("technique", [bs.Int(8, 8), bs.Int(4, 4), bs.Winograd(2)], ids=repr)
def test_reestimated_statistics_are_of_what_the_plan_computes_and_folds_follow(technique: bs.Technique) -> None:
    """The statistics are of the simulated convolution; what folds them afterwards computes with the new ones."""
    model, data = small(steps=20), batches(4, seed=9)
    net = bs.apply(model, bs.Plan({"left": technique}), batches(2))
    with torch.no_grad():
        net(data[0][0])  # what was folded is kept, and must be found out of date
    seen: list[Tensor] = []
    probe = bs.apply(model, bs.Plan({"left": technique}), batches(2))
    probe.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    probe.eval().norm.train()
    with torch.no_grad():
        for x, _ in data:
            probe.norm.momentum = 0.0  # statistics stay, so that weights are rounded as in the network
            probe(x)
    trained = bs.finetune(net, data, F.cross_entropy, steps=1, optimizer=sgd(0.0), reestimate=4)
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3), unbiased=True) for x in seen]).mean(0)
    torch.testing.assert_close(trained.norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)
    assert int(trained.norm.num_batches_tracked) == 4
    # another network that is given these statistics as its own, and folds them afresh
    fresh = bs.apply(model, bs.Plan({"left": technique}), batches(2))
    put(fresh, tensors_of(trained))
    with torch.no_grad():
        torch.testing.assert_close(trained(data[0][0]), fresh(data[0][0]), rtol=0, atol=0)
        assert not torch.equal(trained(data[0][0]), net(data[0][0]))


def test_reestimation_keeps_modes_and_what_no_batch_reaches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.drop = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.9)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(self.drop(x))
            return y

    model = Two()
    model.idle.running_mean.fill_(7.0)
    model.used.momentum = 0.3
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    reestimate_norms(model.train(), [x])
    torch.testing.assert_close(model.used.running_mean, x.mean(0))  # without dropout
    assert model.idle.running_mean.tolist() == [7.0] * 3
    assert model.used.momentum == 0.3
    assert all(module.training for module in model.modules())
    with pytest.raises(bs.TrainingError, match=r"reestimate=2\): the network has no batch normalisation"):
        bs.finetune(nn.Linear(2, 2), [(torch.ones(1, 2), torch.zeros(1, 2))], F.mse_loss, steps=1, reestimate=2)


def test_values_are_taken_out_and_put_back_with_what_cells_keep_beside() -> None:
    plan = bs.Plan({"left": bs.Int(8, 8), "right": bs.Winograd(4, transforms="flex")})
    a, b = (bs.apply(small(steps=5, seed=seed), plan, batches(2, seed=seed)) for seed in (1, 2))
    x = batches(1)[0][0]
    with torch.no_grad():
        first, second = a(x), b(x)
        with with_values(b, copied(a)):
            assert torch.equal(b(x), first)  # scales of quantizers too, which are Python numbers in them
        assert torch.equal(b(x), second)
    with pytest.raises(KeyError, match="other tensors"):
        put(a, tensors_of(small(steps=1)))


# -- validation and history --------------------------------------------------------------------------------------------


def scripted(scores: list[float], lower: bool = False) -> tuple[bs.Task, list[Tensor]]:
    """A task whose scores are given; and the weights that were scored."""
    weights: list[Tensor] = []

    def evaluate(net: nn.Module) -> float:
        weights.append(next(net.parameters()).detach().clone())
        return scores[len(weights) - 1]

    data = batches(1)
    return bs.Task(data, data, evaluate=evaluate, lower=lower), weights


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_best_weights_come_back_and_patience_ends_it(lower: bool, ema: float | None) -> None:
    scores = [0.2, 0.5, 0.4, 0.5, 0.45, 0.9]
    judged, weights = scripted([1 - score for score in scores] if lower else scores, lower)
    history = bs.History()
    trained = bs.finetune(
        *(small(steps=1), batches(2), F.cross_entropy),
        **{"steps": 60, "lr": 0.01, "ema": ema, "validation": judged, "validate_every": 4, "patience": 3},
        history=history,
    )
    assert (len(history), history.stopped, history.best, history.lower) == (20, True, 8, lower)
    assert [step for step, _ in history.validations] == [4, 8, 12, 16, 20]
    assert torch.equal(next(trained.parameters()), weights[1])


def test_validation_changes_nothing_but_what_comes_back() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = small(steps=5), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(self.drop(x))
            return y

    histories = bs.History(), bs.History()
    data = batches(3)
    given: dict[str, Any] = {"steps": 6, "lr": 1e-3, "freeze_norms": False}
    bs.finetune(Noisy(), data, F.cross_entropy, history=histories[0], **given)
    bs.finetune(Noisy(), data, F.cross_entropy, history=histories[1], validation=task(), validate_every=1, **given)
    assert histories[0].losses == histories[1].losses
    assert all(0 <= score <= 1 for _, score in histories[1].validations)
    assert histories[1].metric == task().name


def test_it_is_scored_at_the_end_and_ten_times_without_being_told() -> None:
    history = bs.History()
    bs.finetune(small(steps=1), batches(1), F.cross_entropy, steps=25, validation=task(), history=history)
    assert [step for step, _ in history.validations] == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert not history.stopped


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    judge, model = Validation(task(), 1, 2, 0), small(steps=1)
    assert not judge.take(math.nan, 1, model)
    assert judge.take(0.1, 2, model)
    assert not judge.take(0.1, 3, model)
    assert not judge.stops
    assert not judge.take(math.nan, 4, model)
    assert judge.stops


def test_history_is_emptied_first() -> None:
    history = bs.History()
    for _ in range(2):
        bs.finetune(small(steps=1), batches(1), F.cross_entropy, steps=3, history=history)
    assert len(history) == 3
    assert history[-1].loss == history.losses[-1]
    assert history.best is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accumulate": 0}, r"accumulate=0\): at least 1"),
        ({"every": 0}, r"every=0\): at least 1"),
        ({"validate_every": 0}, r"validate_every=0\): at least 1"),
        ({"clip_norm": 0.0}, r"clip_norm=0\.0\): above 0"),
        ({"precision": "float16"}, "must be 'float32' or 'bfloat16'"),
        ({"patience": 2}, r"patience=2\): at least 1, together with validation="),
        ({"ema": 1.5}, r"ema=1\.5"),
        ({"reestimate": -1}, "a number of items, or 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bs.finetune(small(steps=1), batches(1), F.cross_entropy, **{"steps": 1, **given})


# -- together ----------------------------------------------------------------------------------------------------------


def test_a_plan_of_three_techniques_is_trained_at_once() -> None:
    """A Winograd site, a 4-bit one and one in float: all their parameters move, and the loss falls."""
    model = small(steps=10)
    plan = bs.Plan(
        {"left": bs.Winograd(4, transforms="flex"), "right": bs.Int(4, 4), "head": bs.Float(), "stem": bs.Int(8, 8)}
    )
    net, history = bs.apply(model, plan, batches(2)), bs.History()
    trained = bs.finetune(
        *(net, batches(20, seed=4), F.cross_entropy),
        **{"steps": 60, "lr": 3e-3, "teacher": model, "clip_norm": 5.0, "ema": 0.9, "history": history},
        **{"groups": {"_bitsmith.*": {"lr": 3e-4}}, "validation": task(), "reestimate": 4},
    )
    assert bs.plan_of(trained).sites == plan.sites
    before, after = dict(net.named_parameters()), dict(trained.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, parameter in before.items() if parameter.requires_grad}
    assert any(name.startswith("_bitsmith.") for name in moved)
    assert sum(history.losses[-10:]) < 0.7 * sum(history.losses[:10])
    scores = dict(history.validations)
    assert scores[history.best or 0] == max(scores.values())
    assert computer_of(trained).plan.groups == ()


def test_every_kind_of_technique_in_one_plan_is_trained_at_once() -> None:
    """Tiles, one bit, learned bits, paths and a mask side by side, with the residual addition in 8 bits."""
    model, learn = small(steps=10), bs.Learn("step_range", backward="ewgs")
    sites: dict[str, bs.Technique] = {
        "stem": bs.Int(4, 4, learn=learn, weight_learn=learn),
        "left": bs.Winograd(2),
        "right": bs.Binary(),
        ":add": bs.Int(8, 8),
        "head": bs.Sparse(0.5),
    }
    net, history = bs.apply(model, bs.Plan(sites), batches(2)), bs.History()
    trained = bs.finetune(
        *(net, batches(20, seed=4), F.cross_entropy),
        **{"steps": 60, "lr": 3e-3, "teacher": model, "history": history},
    )
    assert sum(history.losses[-10:]) < 0.7 * sum(history.losses[:10])
    moved = {
        name
        for (name, before), after in zip(net.named_parameters(), trained.parameters(), strict=True)
        if before.requires_grad and not torch.equal(before, after)
    }
    assert moved == {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {type(technique) for technique in bs.plan_of(trained).sites.values()} == {type(t) for t in sites.values()}
