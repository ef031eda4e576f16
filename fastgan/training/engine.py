"""One training step: the only code that runs forward, backward and optimizers.

The trainer knows an engine by `step`, `ledger`, `learning_rates`, `optimizers`, `scaler` and
`average`; how a step is executed is the engine's own affair.

A step is done in pieces, between which processes exchange what they found. Alone, there is one
piece. Of the micro-batches of accumulation each takes its own way forward and back; gradients add
up until the optimizer's step, which comes once.

Whatever differs between steps reaches the device in tensors that are filled before the step begins
(learning rates, the decay of the average, the number of the step, the batch); after that nothing
depends on the host, and a captured step (`fastgan.training.engines`) does the same as this one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.device import Precision
from fastgan.recipes import Batch, Recipe
from fastgan.training.distributed import Exchange, World
from fastgan.training.guards import LossLedger, stack_losses

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
    """Runs a recipe's step operation by operation. The recipe is on its device already.

    Args:
        world: the processes that share the training; each has an engine.
        accumulate: micro-batches per step. With more than one, every tensor of a batch has them as
            its first dimension.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        precision: Precision,
        ema_decay: float,
        *,
        world: World | None = None,
        accumulate: int = 1,
    ) -> None:
        self.recipe = recipe
        self.world = world or World()
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        patience = _FP16_PATIENCE if self.scaler.is_enabled() else 0
        self.ledger = LossLedger(device, patience, self.world.average)
        self.parameters = {phase: phase_parameters(recipe, phase) for phase in recipe.phases}
        self.average = WeightAverage(self.parameters["generator"], ema_decay)
        self.optimizers = {phase: self._adam(phase) for phase in recipe.phases}
        self.learning_rates: dict[str, float] = {}
        """Those of the last step, by phase."""
        self._device = device
        self._precision = precision
        self._accumulate = accumulate
        self._exchanges: dict[str, Exchange] = {}
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
        for shared in self._pieces(batch):
            self.world.average(shared)

    def _pieces(self, batch: Batch) -> Iterator[Tensor]:
        """Does a step; between two pieces of it gives what the processes are to average."""
        batches = self._micro_batches(batch)
        scratches: list[Any] = [None] * len(batches)
        for phase in self.recipe.phases:
            names, losses = self._backward(phase, batches, scratches)
            own = None
            if self.world.size > 1:
                exchange = self._exchange(phase, losses)
                yield exchange.pack(losses)
                own, losses = losses, exchange.unpack()
            self.ledger.record_losses(phase, names, losses, own)
            self.scaler.step(self.optimizers[phase])
            self.optimizers[phase].zero_grad(set_to_none=True)
        self.scaler.update()
        self.average.update()
        for micro_batch, scratch in zip(batches, scratches, strict=True):
            metrics = self.recipe.metrics(micro_batch, scratch)
            self.ledger.record_metrics(metrics, 1 / len(batches))

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        if self._accumulate == 1:
            return [batch]
        return [{name: value[i] for name, value in batch.items()} for i in range(self._accumulate)]

    def _backward(
        self, phase: str, batches: Sequence[Batch], scratches: list[Any]
    ) -> tuple[list[str], Tensor]:
        """Gradients of `phase`; its losses and their names.

        `scratches` are those of the first phase, kept for later phases and for metrics. One batch
        has one graph, which all phases share. Of several only the one at work has a graph: what
        the generator's phase differentiates is computed in it, for the others without a graph.
        """
        names: list[str] = []
        losses: list[Tensor] = []
        alone = len(batches) == 1
        for i, batch in enumerate(batches):
            scratch = scratches[i]
            if scratch is None or (phase == "generator" and not alone):
                with torch.set_grad_enabled(alone or phase == "generator"), self.autocast():
                    scratch = self._begin_step(batch)
                if scratches[i] is None:
                    scratches[i] = scratch
            with self._others_frozen(phase):
                with self.autocast():
                    terms = self._losses(phase, batch, scratch)
                stacked = stack_losses(phase, terms)
                if not alone:
                    stacked = stacked / len(batches)
                self.scaler.scale(stacked.sum()).backward()
            names, losses = list(terms), [*losses, stacked.detach()]
        return names, losses[0] if alone else torch.stack(losses).sum(0)

    def _exchange(self, phase: str, losses: Tensor) -> Exchange:
        """For the parameters that got a gradient: the same at every step and in every process."""
        if phase not in self._exchanges:
            parameters = [p for p in self.parameters[phase].values() if p.grad is not None]
            self._exchanges[phase] = Exchange(parameters, losses)
        return self._exchanges[phase]

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
        optimizer.register_step_pre_hook(functools.partial(_skip_if, self.ledger.tripped))
        return optimizer


def _skip_if(tripped: Tensor, optimizer: Any, args: Any, kwargs: Any) -> None:
    """Fused Adam changes nothing where `found_inf` is 1: GradScaler's finding, or a trip."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        optimizer.found_inf = tripped
    elif found is not tripped:
        optimizer.found_inf = torch.maximum(found, tripped)


def phase_parameters(recipe: Recipe, phase: str) -> dict[str, nn.Parameter]:
    """The parameters that `phase` updates, by their names in the recipe; tied ones once."""
    owned = {id(p) for network in recipe.networks(phase) for p in network.parameters()}
    return {name: p for name, p in recipe.named_parameters() if id(p) in owned}
