"""The one tolerance table: how far an op may be from the fp64 reference, by dtype of its input.

Errors are relative to the size of the expected tensor (its largest magnitude), so that entries
near zero are held to what the computation can resolve. ``exact`` marks results that the op
returns in fp32 although its input has 16 bits: their error is fp32's alone.
"""

import torch
from torch import Tensor

# The inputs themselves are exact in every dtype (they are rounded before the reference sees
# them), so the bounds cover rounding of the result and of fp32 accumulation only.
RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, *, what: str = "result"
) -> None:
    """``actual`` against an fp64 ``expected``; ``dtype`` overrides whose row of the table holds."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    bound = RELATIVE[dtype or actual.dtype]
    expected = expected.double()
    difference = (actual.detach().double().cpu() - expected.detach().cpu()).abs()
    if expected.numel() == 0:
        return
    size = expected.detach().abs().max().item()
    worst = difference.max().item()
    assert worst == worst, f"{what}: NaN"
    assert worst <= bound * max(size, torch.finfo(torch.float32).tiny), (
        f"{what}: off by {worst:.3e} where values reach {size:.3e}; "
        f"relative {worst / max(size, 1e-300):.2e}, allowed {bound:.1e}"
    )
