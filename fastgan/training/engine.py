"""One training step: the only code that runs forward, backward and optimizers.

The trainer knows an engine by `step`, `ledger`, `learning_rates`, `optimizers`, `scaler` and
`average`; how a step is executed is the engine's own affair.

Whatever differs between steps reaches the device in tensors that are filled before the step begins
(learning rates, the decay of the average, the number of the step, the batch); after that nothing
depends on the host, and a captured step (`fastgan.training.engines`) does the same as this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.device import Precision
from fastgan.recipes import Batch, Recipe
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
        self._limit = decay
        self._decay = next(iter(self.average.values())).new_empty(())

    def begin_step(self, step: int) -> None:
        """To be called before update number `step`."""
        self._decay.fill_(min(self._limit, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        averages: list[Tensor] = list(self.average.values())
        values: list[Tensor] = list(self._parameters.values())
        torch._foreach_sub_(averages, values)
        torch._foreach_mul_(averages, self._decay)
        torch._foreach_add_(averages, values)

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
        self.learning_rates: dict[str, float] = {}
        """Those of the last step, by phase."""
        self._device = device
        self._precision = precision
        self._begin_step: Callable[[Batch], Any] = recipe.begin_step
        self._losses: Callable[[str, Batch, Any], dict[str, Tensor]] = recipe.losses

    def step(self, batch: Batch, step: int, steps_per_epoch: int) -> None:
        """One update of every phase; never waits for the device."""
        self.ledger.begin_step(step)
        self.average.begin_step(step)
        for phase, optimizer in self.optimizers.items():
            factor = self.recipe.lr_factor(phase, step, steps_per_epoch)
            self.learning_rates[phase] = self.recipe.optimizer(phase).lr * factor
            for group in optimizer.param_groups:
                group["lr"].fill_(self.learning_rates[phase])
        self._execute(batch)

    def _execute(self, batch: Batch) -> None:
        """The part of a step that is the device's alone."""
        with self.autocast():
            scratch = self._begin_step(batch)
        for phase in self.recipe.phases:
            self._update(phase, batch, scratch)
        self.scaler.update()
        self.average.update()
        self.ledger.record_metrics(self.recipe.metrics(batch, scratch))

    def _update(self, phase: str, batch: Batch, scratch: Any) -> None:
        optimizer = self.optimizers[phase]
        with self._others_frozen(phase):
            with self.autocast():
                terms = self._losses(phase, batch, scratch)
            self.scaler.scale(self.ledger.record_losses(phase, terms)).backward()
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        """The region that networks and losses run in.

        It caches no casts of weights: gradients of a weight that is used twice are then added up
        in fp32, and no captured step refers to a cast that another region made.
        """
        dtype = _AUTOCAST.get(self._precision)
        return torch.autocast(
            self._device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False
        )

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
        parameters = list(self.parameters[phase].values())
        device = parameters[0].device
        # The fused kernel reads an fp32 rate on a GPU, one of any type on a CPU.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        optimizer = torch.optim.Adam(
            parameters,
            lr=torch.tensor(settings.lr, dtype=dtype, device=device),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
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
