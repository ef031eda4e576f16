"""The ops on image planes with their options, and what each implementation of them must compute."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgan as fg
from fastgan.ops.instance_norm import reflection_pad2d
from tolerances import assert_close
from triton_harness import poisoned_buffers


@dataclasses.dataclass(frozen=True)
class Case:
    """An op with its options, as a function of x and further differentiable inputs."""

    run: Callable[..., Any]
    extra: Callable[[Tensor], Sequence[Tensor]] = lambda x: ()
    smallest: int = 1
    """Height and width that the op needs at least."""

    def inputs(self, x: Tensor) -> list[Tensor]:
        return [x, *(i.detach().requires_grad_() for i in self.extra(x))]


def affine(x: Tensor, *shape: int) -> list[Tensor]:
    """Weight and bias, or mean and standard deviation, in fp32 whatever x is."""
    return [torch.rand(shape, device=x.device) + 0.5, torch.randn(shape, device=x.device)]


def smaller(x: Tensor, batch: int) -> Tensor:
    """A style of another size than the content."""
    B, C, H, W = x.shape
    style = 2 * torch.randn(min(batch, B), C, max(H - 1, 1), W, device=x.device) + 1
    return style.to(x.dtype)


def noise(x: Tensor) -> Tensor:
    return torch.randn_like(x)


def correction(x: Tensor) -> int:
    """Bessel's, where the style has positions enough as well."""
    return 1 if x.shape[2] > 2 else 0


CASES: dict[str, Case] = {
    "stats": Case(lambda x, impl: fg.instance_stats(x, correction=correction(x), impl=impl)),
    "mean": Case(lambda x, impl: fg.instance_stats(x, correction=0, impl=impl).mean),
    "std": Case(lambda x, impl: fg.instance_stats(x, correction=0, impl=impl).std),
    "norm": Case(lambda x, impl: fg.instance_norm(x, impl=impl)),
    "norm, relu": Case(lambda x, impl: fg.instance_norm(x, activation="relu", impl=impl)),
    "norm, relu, pad": Case(
        lambda x, impl: fg.instance_norm(x, activation="relu", reflect_pad=1, impl=impl),
        smallest=2,
    ),
    "norm, affine, leaky, residual": Case(
        lambda x, w, b, r, impl: fg.instance_norm(
            x, weight=w, bias=b, residual=r, activation="leaky_relu", impl=impl
        ),
        lambda x: [*affine(x, x.shape[1]), noise(x)],
    ),
    "norm, per image, pad, residual": Case(
        lambda x, w, b, r, impl: fg.instance_norm(
            x, weight=w, bias=b, residual=r, activation="relu", reflect_pad=3, impl=impl
        ),
        lambda x: [*affine(x, *x.shape[:2]), noise(x)],
        smallest=4,
    ),
    "norm, weight alone": Case(
        lambda x, w, impl: fg.instance_norm(x, weight=w, impl=impl),
        lambda x: affine(x, x.shape[1])[:1],
    ),
    "adain": Case(
        lambda x, s, impl: fg.adain(x, s, correction=correction(x), impl=impl),
        lambda x: [smaller(x, len(x))],
    ),
    "adain, one style, alpha": Case(
        lambda x, s, impl: fg.adain(x, s, alpha=0.3, correction=correction(x), impl=impl),
        lambda x: [smaller(x, 1)],
    ),
    "adain, statistics, alpha per image": Case(
        lambda x, std, mean, impl: fg.adain(
            x,
            fg.InstanceStats(mean, std),
            alpha=torch.linspace(0, 1, len(x), device=x.device),
            correction=0,
            impl=impl,
        ),
        lambda x: affine(x, 1, x.shape[1]),
    ),
    "style loss": Case(
        lambda x, std, mean, impl: fg.adain_style_loss(
            [x, x[:, :, :1]],
            [fg.InstanceStats(mean, std), fg.InstanceStats(mean[:1], std[:1])],
            correction=0,
            weights=[1.0, 0.5],
            impl=impl,
        ),
        lambda x: affine(x, *x.shape[:2]),
    ),
    "style loss, one layer": Case(
        lambda x, std, mean, impl: fg.adain_style_loss(
            x, fg.InstanceStats(mean, std), correction=0, impl=impl
        ),
        lambda x: affine(x, 1, x.shape[1]),
    ),
    "reflection pad": Case(
        lambda x, impl: reflection_pad2d(x, (1, 2, 0, 3), impl=impl), smallest=4
    ),
}
# What autograd and torch.compile do with a layout differs from op to op, not from case to case.
CASES_IN_CHANNELS_LAST_OR_BOTH = pytest.mark.parametrize(
    ("case", "layout"),
    [
        *((case, "channels_last") for case in CASES.values()),
        *((CASES[name], "contiguous") for name in ("stats", "norm, relu, pad", "adain")),
    ],
    ids=[*CASES, *(f"{name}, contiguous" for name in ("stats", "norm, relu, pad", "adain"))],
)
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "channels_last of more": lambda x: torch.cat([x.movedim(1, 3)] * 2, 3)[
        ..., : x.shape[1]
    ].movedim(3, 1),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
}


def features(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: str = "contiguous"
) -> Tensor:
    """Planes of different means and deviations, rounded to dtype."""
    B, C = shape[:2]
    scale = torch.rand(B, C, 1, 1) + 0.5
    x = torch.randn(*shape) * scale + 2 * torch.randn(B, C, 1, 1)
    return LAYOUTS[layout](x.to(device, dtype)).detach().requires_grad_()


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check(case: Case, x: Tensor, impl: str) -> None:
    """Values and all gradients, from buffers that held NaN."""
    inputs = case.inputs(x)
    exact_inputs = [i.detach().double().requires_grad_() for i in inputs]
    exact = flat(case.run(*exact_inputs, impl="reference"))
    grads = [torch.randn_like(e) for e in exact]
    with poisoned_buffers():
        outputs = flat(case.run(*inputs, impl=impl))
        grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        input_grads = torch.autograd.grad(outputs, inputs, grads)
    exact_grads = torch.autograd.grad(exact, exact_inputs, [g.double() for g in grads])
    for i, (actual, expected) in enumerate(zip(outputs, exact, strict=True)):
        assert_close(actual, expected, what=f"output {i}")
    for i, (given, actual, expected) in enumerate(
        zip(inputs, input_grads, exact_grads, strict=True)
    ):
        assert actual.dtype == given.dtype
        if x.numel() and not x.mT.is_contiguous():
            assert actual.stride() == torch.empty_like(given).stride()
        assert_close(actual, expected, x.dtype, what=f"gradient {i}")
