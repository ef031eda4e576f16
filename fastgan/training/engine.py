"""One training step: the only code that runs forward, backward and optimizers.

The trainer knows an engine by `step`, `ledger`, `optimizers`, `scaler` and `average`; how a step is
executed is the engine's own affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.device import Precision
from fastgan.recipes import Recipe
from fastgan.training.guards import LossLedger

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FP16_PATIENCE = 10  # steps; GradScaler skips a forward that overflows, and the next may not


class WeightAverage:
    """Exponential moving average of parameters, for inference.

    After update t (from 0): ``average = d·average + (1 - d)·parameter``, where
    ``d = min(decay, (1 + t) / (10 + t))``, so that a short training is not held back by its start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._parameters = dict(parameters)
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.average.values()), list(self._parameters.values()), 1 - decay
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside, and their own values again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


class EagerEngine:
    """Runs a recipe's step operation by operation. The recipe is on its device already."""

    def __init__(
        self, recipe: Recipe, device: torch.device, precision: Precision, ema_decay: float
    ) -> None:
        self.recipe = recipe
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.ledger = LossLedger(device, _FP16_PATIENCE if self.scaler.is_enabled() else 0)
        self.parameters = {phase: phase_parameters(recipe, phase) for phase in recipe.phases}
        self.average = WeightAverage(self.parameters["generator"], ema_decay)
        self.optimizers = {phase: self._adam(phase) for phase in recipe.phases}
        self._rates = {phase: recipe.optimizer(phase).lr for phase in recipe.phases}
        self._device = device
        self._precision = precision

    def step(self, batch: Mapping[str, Tensor], step: int, steps_per_epoch: int) -> None:
        """One update of every phase; never waits for the device."""
        recipe = self.recipe
        self.ledger.begin_step(step)
        with self.autocast():
            scratch = recipe.begin_step(batch)
        for phase in recipe.phases:
            self._update(phase, batch, scratch, recipe.lr_factor(phase, step, steps_per_epoch))
        self.scaler.update()
        self.average.update(step)
        self.ledger.record_metrics(recipe.metrics(batch, scratch))

    def _update(
        self, phase: str, batch: Mapping[str, Tensor], scratch: Any, lr_factor: float
    ) -> None:
        optimizer = self.optimizers[phase]
        with self._others_frozen(phase):
            with self.autocast():  # closed before the weights change: it caches their casts
                terms = self.recipe.losses(phase, batch, scratch)
            self.scaler.scale(self.ledger.record_losses(phase, terms)).backward()
        for group in optimizer.param_groups:
            group["lr"] = self._rates[phase] * lr_factor
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        """The region that networks and losses run in."""
        dtype = _AUTOCAST.get(self._precision)
        return torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def _others_frozen(self, phase: str) -> Iterator[None]:
        """No weight gradients for the networks that other phases update."""
        others = [
            parameter
            for other, parameters in self.parameters.items()
            if other != phase
            for parameter in parameters.values()
        ]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _adam(self, phase: str) -> torch.optim.Adam:
        settings = self.recipe.optimizer(phase)
        optimizer = torch.optim.Adam(
            self.parameters[phase].values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        optimizer.register_step_pre_hook(self._mask)
        return optimizer

    def _mask(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Fused Adam changes nothing where `found_inf` is 1: GradScaler's finding, or a trip."""
        found = getattr(optimizer, "found_inf", None)
        if found is None:
            optimizer.found_inf = self.ledger.tripped
        elif found is not self.ledger.tripped:
            optimizer.found_inf = torch.maximum(found, self.ledger.tripped)


def phase_parameters(recipe: Recipe, phase: str) -> dict[str, nn.Parameter]:
    """The parameters that `phase` updates, by their names in the recipe; tied ones once."""
    owned = {id(p) for network in recipe.networks(phase) for p in network.parameters()}
    return {name: p for name, p in recipe.named_parameters() if id(p) in owned}
