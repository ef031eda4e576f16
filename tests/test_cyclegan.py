"""CycleGAN: its training against the same written with plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgan.models.patchgan import PatchGAN
from fastgan.recipes.cyclegan import CycleGAN, CycleGANConfig
from fastgan.training import preset_config
from fastgan.training.config import DomainPictures, Output
from fastgan.training.data import Augmentation
from parity import assert_same_training, copy_weights, randomise

TINY = CycleGANConfig(width=4, residual_blocks=2, discriminator_width=4, discriminator_layers=2)

# --- CycleGAN with plain torch ------------------------------------------------------------------


class PlainResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def normed(convolution: nn.Module, activation: nn.Module) -> list[nn.Module]:
    return [convolution, nn.InstanceNorm2d(convolution.out_channels), activation]


def plain_generator(config: CycleGANConfig) -> nn.Sequential:
    width = config.width
    layers = [nn.ReflectionPad2d(3), *normed(nn.Conv2d(3, width, 7, bias=False), nn.ReLU())]
    for channels in (width, 2 * width):
        down = nn.Conv2d(channels, 2 * channels, 3, 2, padding=1, bias=False)
        layers += normed(down, nn.ReLU())
    layers += [PlainResidual(4 * width) for _ in range(config.residual_blocks)]
    for channels in (4 * width, 2 * width):
        up = nn.ConvTranspose2d(
            channels, channels // 2, 3, 2, padding=1, output_padding=1, bias=False
        )
        layers += normed(up, nn.ReLU())
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


def plain_discriminator(config: CycleGANConfig) -> nn.Sequential:
    channels = config.discriminator_width
    layers = [nn.Conv2d(3, channels, 4, 2, padding=1), nn.LeakyReLU(0.2)]
    for number in range(1, config.discriminator_layers + 1):
        wider = config.discriminator_width * min(2**number, 8)
        stride = 2 if number < config.discriminator_layers else 1
        convolution = nn.Conv2d(channels, wider, 4, stride, padding=1, bias=False)
        layers += normed(convolution, nn.LeakyReLU(0.2))
        channels = wider
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))


class PlainPool:
    """What is swapped is drawn by the recipe; whether there is room is this pool's to know."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pictures: list[Tensor] = []

    def query(self, pictures: Tensor, drawn: Tensor) -> Tensor:
        if self.capacity == 0:
            return pictures
        returned = []
        for picture, swap, slot in zip(pictures, *drawn.tolist(), strict=True):
            if len(self.pictures) < self.capacity:
                self.pictures.append(picture)
                returned.append(picture)
            elif swap:
                returned.append(self.pictures[slot])
                self.pictures[slot] = picture
            else:
                returned.append(picture)
        return torch.stack(returned)


class PlainCycleGAN:
    """The training of RECIPES: one call per network and picture, twelve in all."""

    def __init__(self, config: CycleGANConfig) -> None:
        self.config = config
        self.g_a, self.g_b = plain_generator(config), plain_generator(config)  # A to B, B to A
        self.d_a, self.d_b = plain_discriminator(config), plain_discriminator(config)  # of A, of B
        self.networks = [self.g_a, self.g_b, self.d_a, self.d_b]
        for network in self.networks:
            network.double()
        self.pool_a, self.pool_b = PlainPool(config.pool_size), PlainPool(config.pool_size)

    def begin(self) -> None:
        self.optimizers = [
            torch.optim.Adam(
                nn.ModuleList(networks).parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=False
            )
            for networks in (self.networks[:2], self.networks[2:])
        ]

    def step(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        config, epoch = self.config, step // STEPS_PER_EPOCH
        decay = max(0, epoch + 1 - config.epochs) / (config.epochs_decay + 1)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = 2e-4 * (1 - decay)
        a, b = batch["A"], batch["B"]
        fake_b, fake_a = self.g_a(a), self.g_b(b)
        generator = {
            "adversarial_A": (self.d_a(fake_a) - 1).square().mean(),
            "adversarial_B": (self.d_b(fake_b) - 1).square().mean(),
            "cycle_A": 10 * (self.g_b(fake_b) - a).abs().mean(),
            "cycle_B": 10 * (self.g_a(fake_a) - b).abs().mean(),
        }
        if config.weight_identity > 0:
            generator |= {
                "identity_A": 10 * config.weight_identity * (self.g_b(a) - a).abs().mean(),
                "identity_B": 10 * config.weight_identity * (self.g_a(b) - b).abs().mean(),
            }
        generator = {f"generator/{name}": term for name, term in generator.items()}
        self.update(0, generator)

        discriminator = {}
        for domain, network, pool, real, fake in (
            ("A", self.d_a, self.pool_a, a, fake_a.detach()),
            ("B", self.d_b, self.pool_b, b, fake_b.detach()),
        ):
            fake = pool.query(fake, batch[f"pool_{domain}"])
            loss = (network(real) - 1).square().mean() + network(fake).square().mean()
            discriminator[f"discriminator/discriminator_{domain}"] = 0.5 * loss
        self.update(1, discriminator)
        return generator | discriminator

    def update(self, index: int, terms: Mapping[str, Tensor]) -> None:
        self.optimizers[index].zero_grad()
        sum(terms.values()).backward()
        self.optimizers[index].step()


STEPS_PER_EPOCH = 2


def networks(recipe: CycleGAN) -> Sequence[nn.Module]:
    """In the order of `PlainCycleGAN.networks`."""
    return [
        recipe.generators["AtoB"],
        recipe.generators["BtoA"],
        recipe.discriminators["A"],
        recipe.discriminators["B"],
    ]


# --- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"weight_identity": 0.0}, {"pool_size": 0}], ids=str)
def test_training_equals_the_one_written_with_plain_torch(changes: dict[str, float]) -> None:
    """Over enough steps for the pool to fill up and swap, and for the learning rate to fall."""
    config = dataclasses.replace(
        TINY, **{"pool_size": 3, "epochs": 1, "epochs_decay": 4, **changes}
    )
    recipe, plain = CycleGAN(config), PlainCycleGAN(config)
    recipe.begin_training(16)
    recipe.double()
    randomise(recipe)
    copy_weights(networks(recipe), plain.networks)
    plain.begin()
    assert_same_training(
        recipe,
        plain.step,
        networks(recipe),
        plain.networks,
        size=16,
        batch_size=2,
        steps=6,
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    assert len(plain.pool_a.pictures) == config.pool_size
    for pool, stored in ((recipe.pools["A"], plain.pool_a), (recipe.pools["B"], plain.pool_b)):
        for ours, theirs in zip(pool.images, stored.pictures, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_each_network_is_called_twice() -> None:
    recipe = CycleGAN(TINY)
    recipe.begin_training(16)
    calls = dict.fromkeys(("AtoB", "BtoA", "A", "B"), 0)
    for group in (recipe.generators, recipe.discriminators):
        for name, network in group.items():

            def count(module: nn.Module, args: object, name: str = name) -> None:
                calls[name] += 1

            network.register_forward_pre_hook(count)
    batch = {domain: torch.rand(1, 3, 16, 16) for domain in "AB"}
    batch |= recipe.draw(0, 1, torch.Generator())
    scratch = recipe.begin_step(batch)
    for phase in recipe.phases:
        recipe.losses(phase, batch, scratch)
    assert calls == dict.fromkeys(calls, 2)


def test_the_default_networks_are_those_of_the_public_code() -> None:
    recipe, plain = CycleGAN(CycleGANConfig()), PlainCycleGAN(CycleGANConfig())
    for ours, theirs in zip(networks(recipe), plain.networks, strict=True):
        shapes = [parameter.shape for parameter in theirs.parameters()]
        assert [parameter.shape for parameter in ours.parameters()] == shapes
        for module in ours.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                if module.weight.numel() > 10_000:
                    assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert module.bias is None or not module.bias.any()
    judge = recipe.discriminators["A"]
    pictures = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = judge(pictures)
    assert logits.shape == (1, 1, 30, 30)
    without_norm = nn.Sequential(judge.first, *judge.middle, judge.last)  # norms see everything
    without_norm(pictures)[0, 0, 15, 15].backward()
    seen = pictures.grad.abs().sum((0, 1))
    assert (seen.any(0).sum(), seen.any(1).sum()) == (70, 70)


def test_schedule() -> None:
    recipe = CycleGAN(CycleGANConfig())
    for phase in recipe.phases:
        settings = recipe.optimizer(phase)
        assert (settings.lr, settings.betas, settings.weight_decay) == (2e-4, (0.5, 0.999), 0.0)
        for epoch, factor in ((0, 1), (99, 1), (100, 100 / 101), (199, 1 / 101), (201, 0)):
            for step in (0, 6):
                actual = recipe.lr_factor(phase, 7 * epoch + step, 7)
                assert actual == pytest.approx(factor, abs=1e-12)
    assert recipe.default_steps(7) == 1400


def test_the_first_preset_has_the_constants_of_the_public_code() -> None:
    config = preset_config(CycleGAN, None, DomainPictures(Path("data")), Output(Path("run")))
    assert config.preset == "base"
    assert config.training.batch_size == 1
    assert config.augmentation == Augmentation(
        size=256, resize=286, flip=True, rotate=0.0, jitter=0.0
    )
    assert dataclasses.asdict(config.recipe) == {
        "width": 64,
        "residual_blocks": 9,
        "discriminator_width": 64,
        "discriminator_layers": 3,
        "pool_size": 50,
        "gan_mode": "lsgan",
        "weight_adversarial": 1.0,
        "weight_cycle": 10.0,
        "weight_identity": 0.5,
        "lr": 2e-4,
        "beta1": 0.5,
        "beta2": 0.999,
        "epochs": 100,
        "epochs_decay": 100,
    }
    recipe = CycleGAN(config.recipe)
    for judge in recipe.discriminators.values():
        convolutions = [module for module in judge.modules() if isinstance(module, nn.Conv2d)]
        assert [
            (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)
            for layer in convolutions
        ] == [
            (3, 64, (4, 4), (2, 2)),
            (64, 128, (4, 4), (2, 2)),
            (128, 256, (4, 4), (2, 2)),
            (256, 512, (4, 4), (1, 1)),
            (512, 1, (4, 4), (1, 1)),
        ]
    for generator in recipe.generators.values():
        assert (generator.head.in_channels, len(generator.blocks)) == (64, 9)


# --- Pool ---------------------------------------------------------------------------------------


def test_the_pool_is_state_and_its_chances_are_the_generators() -> None:
    recipe = CycleGAN(TINY)
    recipe.begin_training(16)
    assert set(recipe.training_state()) == {
        f"pools.{domain}.{name}" for domain in "AB" for name in ("images", "count")
    }
    assert recipe.training_state()["pools.A.images"].shape == (50, 3, 16, 16)
    drawn = [recipe.draw(3, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not all(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    batch = {domain: torch.rand(2, 3, 16, 16) for domain in "AB"} | drawn[0]
    before = {name: value.clone() for name, value in recipe.training_state().items()}
    scratch = recipe.begin_step(batch)
    for name, value in recipe.training_state().items():
        assert torch.equal(value, before[name]), name
    recipe.losses("discriminator", batch, scratch)
    state = recipe.training_state()
    assert torch.equal(state["pools.A.images"][:2], scratch.fakes["A"])
    assert state["pools.B.count"] == 2


@pytest.mark.parametrize("field", ["residual_blocks", "discriminator_layers", "pool_size", "lr"])
def test_settings_that_cannot_be_trained_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be at least"):
        CycleGANConfig(**{field: -1})


def test_patchgan_of_other_depths() -> None:
    for layers, smallest in ((1, 6), (2, 12), (3, 24)):
        judge = PatchGAN(4, layers)
        assert judge(torch.rand(1, 3, smallest, smallest + 9)).shape[2] == 1
        with pytest.raises(ValueError, match=f"at least {smallest} px"):
            judge(torch.rand(1, 3, smallest + 9, smallest - 1))
    assert [PatchGAN(4, layers)(torch.rand(1, 3, 64, 64)).shape[2] for layers in (1, 2, 4)] == [
        30, 14, 2
    ]  # fmt: skip
