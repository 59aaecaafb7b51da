from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from bitsmith.data import DataError, ModelRunError, Unlabelled
from bitsmith.metrics import metric, squared_error, top1
from bitsmith.store import hash_state
from bitsmith.task import NonFiniteError, Task, TaskError, drop, evaluating, mean_loss, score

G = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, generator=G)
Y = torch.randint(0, 4, (20,), generator=G)
BATCHES = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]  # the last one is smaller


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))


def task(**changes: Any) -> Task:
    return Task(**{"calibration": BATCHES, "validation": BATCHES, "metric": top1, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"metric": None}, TaskError, "give either metric="),
        ({"evaluate": lambda model: 1.0}, TaskError, "give either metric="),
        ({"validation": None}, TaskError, "validation=None"),
        ({"calibration": None}, TaskError, "calibration=None"),
        ({"metric": "top1"}, TaskError, "metric='top1'.*a function"),
        ({"loss": 0.5}, TaskError, "loss=0.5"),
        ({"lower": True}, TaskError, "says higher is better"),
        ({"draws": 0}, TaskError, "draws=0"),
        ({"metric": None, "evaluate": lambda m: 1.0, "test": BATCHES}, TaskError, "test would never be read"),
        ({"validation": iter(BATCHES)}, DataError, "validation loader is a one-shot"),
        ({"test": iter(BATCHES)}, DataError, "test loader is a one-shot"),
        (
            {"validation": DataLoader(TensorDataset(X, Y), sampler=RandomSampler(X))},  # type: ignore[arg-type]
            DataError,
            "validation loader shuffles",
        ),
    ],
)
def test_a_task_that_cannot_work_is_refused_at_once(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        task(**changes)


def test_score_against_the_plain_equation() -> None:
    model = network().eval()
    got = score(model, task())
    expected = (model(X).argmax(1) == Y).double()
    np.testing.assert_array_equal(got.scores, expected.numpy())
    assert got.scores.dtype == np.float32
    assert (got.mean, got.n, got.name, got.lower, got.spread) == (float(expected.mean()), 20, "top1", False, 0.0)
    assert got.low is not None
    assert got.high is not None
    assert got.low < got.mean < got.high
    assert "n = 20" in str(got)


def test_scoring_leaves_the_model_bitwise_as_it_was() -> None:
    model = network().train()
    model[2].eval()  # mixed flags
    before, flags = hash_state(model), [module.training for module in model.modules()]
    first = score(model, task(loss=F.cross_entropy))
    mean_loss(model, task(loss=F.cross_entropy))
    assert hash_state(model) == before
    assert [module.training for module in model.modules()] == flags
    assert score(model, task()).mean == first.mean  # dropout was off
    with pytest.raises(ModelRunError):
        score(model, task(validation=[(X[:, :2], Y)]))
    assert [module.training for module in model.modules()] == flags


class Noisy(nn.Module):
    """Counts its calls in a buffer, and replaces another one."""

    count: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.full((2,), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x[0]
        noise = torch.Generator().manual_seed(int(self.count))
        return torch.randn(len(x), 4, generator=noise)


def test_draws_differ_and_yet_repeat() -> None:
    model = Noisy()
    count, last = model.count, model.last
    got = score(model, task(draws=5))
    assert model.count is count
    assert int(count) == 0
    assert model.last is last
    assert torch.isnan(last).all()
    assert score(model, task(draws=5)) == got
    expected = []
    for draw in range(5):
        outputs = [
            torch.randn(len(x), 4, generator=torch.Generator().manual_seed(draw * 3 + i + 1))
            for i, (x, _) in enumerate(BATCHES)
        ]
        expected.append((torch.cat(outputs).argmax(1) == Y).double())
    means = np.array([float(e.mean()) for e in expected])
    assert got.draws == 5
    assert got.spread == pytest.approx(means.std(ddof=1))
    assert got.spread > 0
    assert got.mean == pytest.approx(means.mean())
    np.testing.assert_allclose(got.scores, torch.stack(expected).mean(0), rtol=1e-6)


def test_buffers_are_restored_when_the_model_raises() -> None:
    model = Noisy()

    def fail() -> None:
        with evaluating(model):
            model(X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert int(model.count) == 0


def test_gradients_are_off_but_tensors_keep_versions() -> None:
    seen = []

    def keep(output: Tensor, target: Tensor) -> Tensor:
        seen.append(output)
        return output[:, 0]

    score(network(), task(metric=keep))
    assert len(seen) == 3
    assert not any(output.requires_grad or output.is_inference() for output in seen)


def test_splits_forward_and_structure() -> None:
    model, test = network().eval(), [({"deep": X[:5]}, Y[:5])]

    def forward(model: nn.Module, inputs: Any) -> Any:
        return model(inputs["deep"] if isinstance(inputs, dict) else inputs)

    made = task(test=test, forward=forward)
    assert score(model, made, "test").n == 5
    assert score(model, made, "calibration").n == 20
    with pytest.raises(TaskError, match="no test data"):
        score(model, task(), "test")
    with pytest.raises(TaskError, match="split 'val'"):
        score(model, task(), "val")  # type: ignore[arg-type]


def test_a_plain_function_is_scored_too() -> None:
    assert score(lambda x: F.one_hot(Y[:8], 4).float(), task(validation=BATCHES[:1])).mean == 1.0


def test_plain_metric_takes_the_tasks_direction() -> None:
    def error(output: Tensor, target: Tensor) -> Tensor:
        return output[:, 0].abs()

    assert score(network(), task(metric=error, lower=True)).lower
    assert task(metric=squared_error).lower
    assert not task(metric=error).lower


def test_nan_is_an_error_that_tells_inputs_from_model() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = torch.zeros(len(x), 4)
            out[1:3] = math.nan
            return out, x

    with pytest.raises(NonFiniteError, match=r"validation item 0.*8 NaN of 32; its inputs have none"):
        score(Broken(), task())
    dirty = X.clone()
    dirty[9, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"validation item 1.*its inputs have NaN too"):
        score(network(), task(validation=[(dirty[:8], Y[:8]), (dirty[8:], Y[8:])]))


def test_masked_logits_may_be_infinite() -> None:
    assert score(lambda x: F.one_hot(Y[:8], 4).float().log(), task(validation=BATCHES[:1])).mean == 1.0


def test_corpus_metric_has_no_sample_size_and_says_so() -> None:
    model = network().train()
    states = []

    def f1(net: nn.Module) -> float:
        states.append((net.training, torch.is_grad_enabled()))
        return 0.75 if net is model else 0.70

    made = task(metric=None, evaluate=f1, lower=False)
    reference = score(model, made)
    assert (reference.mean, reference.n, reference.low, reference.high, reference.name) == (0.75, 0, None, None, "f1")
    assert states == [(False, False)]
    assert model.training
    assert "n = unknown" in str(reference)
    lost = drop(reference, score(network(), made))
    assert lost.mean == pytest.approx(0.05)
    assert (lost.n, lost.low, lost.high) == (0, None, None)
    with pytest.raises(TaskError, match="its own data only"):
        score(model, made, "calibration")
    with pytest.raises(NonFiniteError, match="returned nan"):
        score(model, task(metric=None, evaluate=lambda net: math.nan))


def test_unlabelled_validation_with_a_metric_of_the_output_alone() -> None:
    made = task(validation=Unlabelled([X[:8], X[8:]]), metric=metric(lambda output, target: output.amax(1)))
    assert score(network(), made).n == 20


def test_a_loader_that_changes_its_order_is_found_when_paired() -> None:
    class Shuffling:
        turn = 0

        def __iter__(self) -> Any:
            self.turn += 1
            return iter(BATCHES if self.turn % 2 else BATCHES[::-1])

    made = task(validation=Shuffling())
    model = network()
    with pytest.raises(DataError, match="another order"):
        drop(score(model, made), score(model, made))


def test_mean_loss_weights_batches_by_their_samples() -> None:
    model = network().eval()
    expected = F.cross_entropy(model(X).double(), Y).item()
    assert mean_loss(model, task(loss=F.cross_entropy), "validation") == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TaskError, match="no loss"):
        mean_loss(model, task())
    with pytest.raises(TaskError, match="one number was expected"):
        mean_loss(model, task(loss=lambda output, target: F.cross_entropy(output, target, reduction="none")))
    with pytest.raises(NonFiniteError, match="calibration item 0: the loss is inf"):
        mean_loss(model, task(loss=lambda output, target: output.sum() * 0 + math.inf))


def test_progress_counts_batches_over_all_draws() -> None:
    seen: list[tuple[int, int | None]] = []
    score(network(), task(draws=2), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
