"""Everything that decides how a training goes on, out of its parts and back into them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.training.engine import EagerEngine

log = logging.getLogger(__name__)


def engine_state(engine: EagerEngine, keys: Iterable[str]) -> dict[str, Any]:
    """Networks (the entries `keys` of the recipe's state dict) and all that trains them."""
    networks = engine.recipe.state_dict()
    return {
        "networks": {key: networks[key] for key in keys},
        "average": dict(engine.average.average),
        "optimizers": {
            phase: {
                name: dict(optimizer.state[parameter])
                for name, parameter in engine.parameters[phase].items()
                if parameter in optimizer.state
            }
            for phase, optimizer in engine.optimizers.items()
        },
        "scaler": engine.scaler.state_dict(),
        "training_state": dict(engine.recipe.training_state()),
    }


def restore_engine(engine: EagerEngine, keys: Iterable[str], state: dict[str, Any]) -> None:
    """Puts back what `engine_state` gave, each tensor in the memory layout of its parameter.

    Comes before the engine's first step: a captured step would go on with the tensors it knows.

    Raises:
        ValueError: the networks of `state` are not those of the engine; names the difference.
    """
    networks = engine.recipe.state_dict()
    here = {key: list(networks[key].shape) for key in keys}
    there = {key: list(saved.shape) for key, saved in state["networks"].items()}
    for key in {**there, **here}:
        if here.get(key) != there.get(key):
            raise ValueError(
                "the checkpoint's networks are not those of these settings: "
                f"{key} is {there.get(key, 'not')} there and {here.get(key, 'not')} here"
            )
    _copy(networks, state["networks"])
    _copy(engine.average.average, state["average"])
    for phase, optimizer in engine.optimizers.items():
        for name, moments in state["optimizers"][phase].items():
            parameter = engine.parameters[phase][name]
            optimizer.state[parameter] = {
                key: _like(parameter, value) for key, value in moments.items()
            }
    if engine.scaler.is_enabled() and state["scaler"]:
        engine.scaler.load_state_dict(state["scaler"])
    own, saved = dict(engine.recipe.training_state()), state["training_state"]
    if {key: value.shape for key, value in own.items()} == {
        key: value.shape for key, value in saved.items()
    }:
        _copy(own, saved)
    else:  # crops of another size, say
        log.warning("the checkpoint's %s cannot be used here: begun anew", ", ".join(saved))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of the random number generators of Python, NumPy, torch and `device`."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (the legacy generator is the global one)
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of `rng_state`; the state of another kind of device is left aside."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@torch.no_grad()
def _copy(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` with the device and strides of `parameter`, which fused optimizers rely on."""
    if value.shape != parameter.shape:  # a step count
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
