"""CycleGAN's networks and training step in plain torch.nn, in the style of the public code.

The baseline that CycleGAN steps are measured against; nothing here comes from fastgan. Modules are
numbered like those of the public generator, so that their state dict has its keys.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + norm(conv(pad(relu(norm(conv(pad(x)))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    """7x7 convolution, two halvings, residual blocks, two doublings, 7x7 convolution, tanh."""

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7)]
        layers += [nn.InstanceNorm2d(width), nn.ReLU(True)]
        for channels in (width, 2 * width):
            layers.append(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1))
            layers += [nn.InstanceNorm2d(2 * channels), nn.ReLU(True)]
        layers += [ResidualBlock(4 * width) for _ in range(blocks)]
        for channels in (4 * width, 2 * width):
            layers.append(
                nn.ConvTranspose2d(
                    channels, channels // 2, 3, stride=2, padding=1, output_padding=1
                )
            )
            layers += [nn.InstanceNorm2d(channels // 2), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Discriminator(nn.Module):
    """70x70 PatchGAN."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1)]
        layers.append(nn.LeakyReLU(0.2, True))
        for channels, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers.append(nn.Conv2d(channels, 2 * channels, 4, stride=stride, padding=1))
            layers += [nn.InstanceNorm2d(2 * channels), nn.LeakyReLU(0.2, True)]
        layers.append(nn.Conv2d(8 * width, 1, 4, padding=1))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def initialise(network: nn.Module) -> None:
    """N(0, 0.02) for weights, zeros for biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)


class CycleGAN(nn.Module):
    """Both generators, both discriminators and one update of them: lsgan, cycle and identity L1."""

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        self.a_to_b, self.b_to_a = Generator(width, blocks), Generator(width, blocks)
        self.judge_a, self.judge_b = Discriminator(width), Discriminator(width)
        initialise(self)

    def prepare(self, autocast: torch.dtype | None, *, fused: bool = False) -> None:
        """Make the optimizers; to be called with the networks on their device."""
        self.autocast = autocast
        options = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": fused or None}
        generators = chain(self.a_to_b.parameters(), self.b_to_a.parameters())
        judges = chain(self.judge_a.parameters(), self.judge_b.parameters())
        self.generator_optimizer = torch.optim.Adam(generators, **options)
        self.judge_optimizer = torch.optim.Adam(judges, **options)

    def step(self, real_a: Tensor, real_b: Tensor) -> list[Tensor]:
        """One update; returns the loss of the generators and that of the discriminators."""
        for judge in (self.judge_a, self.judge_b):
            judge.requires_grad_(False)
        with self._region(real_a):
            fake_a, fake_b, generator_loss = self._generator_loss(real_a, real_b)
        self.generator_optimizer.zero_grad()
        generator_loss.backward()
        self.generator_optimizer.step()

        for judge in (self.judge_a, self.judge_b):
            judge.requires_grad_(True)
        self.judge_optimizer.zero_grad()
        judges_loss = torch.zeros_like(generator_loss)
        pairs = ((self.judge_a, real_a, fake_a), (self.judge_b, real_b, fake_b))
        for judge, real, fake in pairs:
            with self._region(real):
                loss = (lsgan(judge(real), 1.0) + lsgan(judge(fake.detach()), 0.0)) / 2
            loss.backward()
            judges_loss += loss.detach()
        self.judge_optimizer.step()
        return [generator_loss.detach(), judges_loss]

    def _generator_loss(self, real_a: Tensor, real_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fake_b, fake_a = self.a_to_b(real_a), self.b_to_a(real_b)
        again_a, again_b = self.b_to_a(fake_b), self.a_to_b(fake_a)
        identity = F.l1_loss(self.a_to_b(real_b), real_b) + F.l1_loss(self.b_to_a(real_a), real_a)
        cycle = F.l1_loss(again_a, real_a) + F.l1_loss(again_b, real_b)
        fooling = lsgan(self.judge_b(fake_b), 1.0) + lsgan(self.judge_a(fake_a), 1.0)
        return fake_a, fake_b, fooling + 10 * cycle + 5 * identity

    def _region(self, images: Tensor) -> torch.autocast:
        enabled = self.autocast is not None
        return torch.autocast(images.device.type, dtype=self.autocast, enabled=enabled)


def lsgan(prediction: Tensor, label: float) -> Tensor:
    """Mean squared error against a map of one label."""
    return F.mse_loss(prediction, torch.full_like(prediction, label))
