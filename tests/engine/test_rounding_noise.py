"""Rounding noise changes the results of the running thread alone."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from lightning_gradmetrics.engine.checks.rounding_noise import rounding_noise


def test_models_of_other_threads_are_not_changed() -> None:
    model, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    expected = model(inputs)
    with ThreadPoolExecutor(1) as other, rounding_noise():
        noisy, undisturbed = model(inputs), other.submit(model, inputs).result()
    assert torch.equal(undisturbed, expected)
    assert not torch.equal(noisy, expected)
    torch.testing.assert_close(noisy, expected)
    assert torch.equal(model(inputs), expected)
