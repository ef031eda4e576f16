"""The discriminator's memory of earlier fakes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImagePool(nn.Module):
    """Mixes fakes of this step with fakes of earlier ones, which keeps a discriminator from
    forgetting what it has learned (Shrivastava et al. 2017, as CycleGAN uses it).

    Picture after picture: while the pool is not full, store it and return it; then, with
    probability 1/2, return a stored one and put the new one in its place, else return the new one.

    Chance decides on the host (`draw`); everything else happens on the device without a branch, so
    that a step can be captured. The state, pictures and their count, is in persistent buffers.

    Args:
        capacity: pictures to keep; 0 returns what comes in.
        shape: of one picture, (channels, height, width).
    """

    images: Tensor
    count: Tensor

    def __init__(self, capacity: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0, got {capacity}")
        self.capacity = capacity
        self.register_buffer("images", torch.zeros(capacity, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Chance for `batch_size` pictures: int64 [2,B], whether to swap and with which slot."""
        swap = torch.randint(2, (batch_size,), generator=generator)
        slot = torch.randint(max(self.capacity, 1), (batch_size,), generator=generator)
        return torch.stack([swap, slot])

    @torch.no_grad()
    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:
        """`images` [B,C,H,W] or what replaces them, detached; `drawn` as from `draw`."""
        if images.shape[1:] != self.images.shape[1:] or drawn.shape != (2, len(images)):
            raise ValueError(
                f"ImagePool: images must be [B, {', '.join(map(str, self.images.shape[1:]))}] "
                f"and drawn [2, B], got {list(images.shape)} and {list(drawn.shape)}"
            )
        if self.capacity == 0:
            return images.detach()
        place = self.count + torch.arange(len(images), device=images.device)
        filling = place < self.capacity
        keep = filling | (drawn[0] == 0)  # return the new picture
        store = filling | (drawn[0] == 1)
        slot = torch.where(filling, place, drawn[1])
        returned = []
        for i, new in enumerate(images.to(self.images.dtype).split(1)):
            stored = self.images[slot[i : i + 1]]
            returned.append(torch.where(keep[i], new, stored))
            self.images.index_copy_(0, slot[i : i + 1], torch.where(store[i], new, stored))
        self.count.add_(len(images)).clamp_(max=self.capacity)
        return torch.cat(returned).to(images.dtype)
