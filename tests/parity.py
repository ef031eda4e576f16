"""A recipe under its engine against the same training written without fastgan, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

import fastgan as fg
from fastgan.recipes import Recipe
from fastgan.training.engine import EagerEngine

RTOL = 1e-9

PlainStep = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
"""Batch and number of the step -> its loss terms, by the names the engine logs them under."""


def copy_weights(of: Iterable[nn.Module], into: Iterable[nn.Module]) -> None:
    """Parameter by parameter in their order, which has to fit."""
    for network, other in zip(of, into, strict=True):
        for value, target in zip(network.parameters(), other.parameters(), strict=True):
            assert value.shape == target.shape
            target.data.copy_(value)


def randomise(recipe: Recipe) -> None:
    """Large and different weights everywhere, biases too, so that no term is small or symmetric."""
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def assert_same_training(
    recipe: Recipe,
    plain_step: PlainStep,
    networks: Iterable[nn.Module],
    plain_networks: Iterable[nn.Module],
    *,
    size: int,
    batch_size: int,
    steps: int = 3,
    steps_per_epoch: int = 1,
) -> None:
    """Every loss term of every step and, after the last, every weight."""
    engine = EagerEngine(recipe, torch.device("cpu"), "fp32", ema_decay=0.0)
    shape = (batch_size, 3, size, size)
    for step in range(steps):
        batch = {domain: torch.rand(shape, dtype=torch.float64) * 2 - 1 for domain in "AB"}
        batch |= recipe.draw(step, batch_size, torch.Generator().manual_seed(step))
        torch.manual_seed(step)
        expected = plain_step(batch, step)
        torch.manual_seed(step)
        with fg.use_impl("reference"):
            engine.step(batch, step, steps_per_epoch)
        terms, _ = engine.ledger.read()
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(torch.tensor(terms[name], dtype=torch.float64), value, name)
    for network, plain in zip(networks, plain_networks, strict=True):
        named = zip(network.named_parameters(), plain.parameters(), strict=True)
        for (name, parameter), value in named:
            assert_equal(parameter, value, name)


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    expected = expected.detach()
    torch.testing.assert_close(
        actual.detach(),
        expected,
        rtol=RTOL,
        atol=RTOL * expected.abs().max().item(),
        msg=lambda text: f"{what}: {text}",
    )
