"""Batch normalisations take the statistics of real inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitsmith.data import DataError, Unlabelled
from bitsmith.zoo.mobilenet import mobilenet_v2
from bitsmith.zoo.statistics import settle_statistics


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).eval()


def images(seed: int, samples: int = 6) -> torch.Tensor:
    return torch.randn(samples, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_statistics_are_those_of_the_layers_inputs_averaged_over_batches() -> None:
    model = net()
    batches = [images(0), images(1)]
    settled = settle_statistics(model, Unlabelled(batches))
    means, variances = [], []
    for x in batches:
        out = model[0](x).detach().double()
        means.append(out.mean((0, 2, 3)).numpy())
        variances.append(out.transpose(0, 1).flatten(1).var(1).numpy())  # unbiased, as torch keeps it
    np.testing.assert_allclose(settled[1].running_mean.numpy(), np.mean(means, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(settled[1].running_var.numpy(), np.mean(variances, 0), rtol=1e-4)
    # the second layer saw what the first one, with the batch's statistics, gave
    normalised = torch.relu(nn.functional.batch_norm(model[0](batches[0]), None, None, training=True))
    alone = settle_statistics(model, Unlabelled(batches[:1]))
    want = model[3](normalised).mean((0, 2, 3))
    torch.testing.assert_close(alone[4].running_mean, want, rtol=1e-4, atol=1e-5)


def test_the_model_is_untouched_and_the_copy_is_in_its_mode() -> None:
    model = net()
    model[1].momentum = 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settled = settle_statistics(model, [(images(0), torch.zeros(6))])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in settled.modules())
    assert settled[1].momentum == 0.3
    assert settle_statistics(net().train(), [(images(0), torch.zeros(6))]).training


def test_a_deep_network_of_random_weights_tells_images_apart() -> None:
    model = mobilenet_v2(0.35, 10)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    settled = settle_statistics(model, Unlabelled([x]))
    with torch.no_grad():
        out = settled(x)
        bottleneck = settled.features[:-1](x)
    assert 0.1 < bottleneck.std() < 10
    assert out.std(0).mean() > 0.1


def test_nothing_to_settle_and_no_data_are_errors() -> None:
    with pytest.raises(ValueError, match="no batch normalisation"):
        settle_statistics(nn.Linear(2, 2), Unlabelled([torch.zeros(1, 2)]))
    with pytest.raises(DataError, match="empty"):
        settle_statistics(net(), [])
