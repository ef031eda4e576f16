"""UNIT: its networks and its training against the same written with plain torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgan import checkpoint
from fastgan.inference import load_recipe
from fastgan.models.unit import Discriminator, LayerNorm
from fastgan.recipes.serialize import to_json
from fastgan.recipes.unit import UNIT, UNITConfig
from parity import assert_same_training, copy_weights, randomise

TINY = UNITConfig(width=4, residual_blocks=2, discriminator_width=4, discriminator_layers=2)

# --- UNIT with plain torch ----------------------------------------------------------------------


class PlainLayerNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3), keepdim=True)
        std = x.flatten(1).std(1)[:, None, None, None]
        return (x - mean) / (std + 1e-5) * self.gamma[:, None, None] + self.beta[:, None, None]


class PlainResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *plain_block(channels, channels, 3), *plain_block(channels, channels, 3)[:-1]
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def plain_block(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Same padding by reflection, convolution, instance norm, ReLU."""
    return [
        nn.ReflectionPad2d((kernel - 1) // 2),
        nn.Conv2d(channels, out, kernel, stride, bias=False),
        nn.InstanceNorm2d(out),
        nn.ReLU(),
    ]


def plain_encoder(config: UNITConfig) -> nn.Sequential:
    layers, width = plain_block(3, config.width, 7), config.width
    for _ in range(config.downsamplings):
        layers += plain_block(width, 2 * width, 4, 2)
        width *= 2
    return nn.Sequential(*layers, *(PlainResidual(width) for _ in range(config.residual_blocks)))


def plain_decoder(config: UNITConfig) -> nn.Sequential:
    width = config.width * 2**config.downsamplings
    layers: list[nn.Module] = [PlainResidual(width) for _ in range(config.residual_blocks)]
    for _ in range(config.downsamplings):
        convolution = nn.Conv2d(width, width // 2, 5)
        width //= 2
        layers += [nn.Upsample(scale_factor=2), nn.ReflectionPad2d(2), convolution]
        layers += [PlainLayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


class PlainDiscriminator(nn.Module):
    def __init__(self, config: UNITConfig) -> None:
        super().__init__()
        self.stacks = nn.ModuleList()
        for _ in range(config.discriminator_scales):
            channels = [3] + [
                config.discriminator_width * 2**i for i in range(config.discriminator_layers)
            ]
            layers: list[nn.Module] = []
            for fine, coarse in itertools.pairwise(channels):
                layers += [nn.ReflectionPad2d(1), nn.Conv2d(fine, coarse, 4, 2), nn.LeakyReLU(0.2)]
            self.stacks.append(nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 1)))

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = []
        for stack in self.stacks:
            logits.append(stack(x))
            x = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)(x)
        return logits


class PlainUNIT:
    """The training of RECIPES: discriminators, then autoencoders, each with Adam."""

    def __init__(self, config: UNITConfig) -> None:
        self.config = config
        self.enc_a, self.enc_b = plain_encoder(config), plain_encoder(config)
        self.dec_a, self.dec_b = plain_decoder(config), plain_decoder(config)
        self.dis_a, self.dis_b = PlainDiscriminator(config), PlainDiscriminator(config)
        if config.share_latent:
            self.enc_b[-1], self.dec_b[0] = self.enc_a[-1], self.dec_a[0]
        self.networks = [self.enc_a, self.enc_b, self.dec_a, self.dec_b, self.dis_a, self.dis_b]
        for network in self.networks:
            network.double()
        self.optimizers: list[torch.optim.Adam] = []

    def begin(self) -> None:
        for networks in (self.networks[:4], self.networks[4:]):
            parameters = nn.ModuleList(networks).parameters()
            self.optimizers.append(
                torch.optim.Adam(
                    parameters, lr=1e-4, betas=(0.5, 0.999), weight_decay=1e-4, foreach=False
                )
            )

    def step(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = 1e-4 * 0.5 ** (step // self.config.lr_decay_every)
        a, b = batch["A"], batch["B"]
        mean_a, mean_b = self.enc_a(a), self.enc_b(b)
        latent_a, latent_b = self.with_noise(mean_a), self.with_noise(mean_b)
        fake_a, fake_b = self.dec_a(latent_b), self.dec_b(latent_a)

        discriminator = {
            "discriminator/discriminator_A": self.judge(self.dis_a, a, fake_a.detach()),
            "discriminator/discriminator_B": self.judge(self.dis_b, b, fake_b.detach()),
        }
        self.update(1, discriminator)

        mean_aba, mean_bab = self.enc_b(fake_b), self.enc_a(fake_a)
        cycle_a = self.dec_a(self.with_noise(mean_aba))
        cycle_b = self.dec_b(self.with_noise(mean_bab))
        generator = {
            "adversarial_A": sum((x - 1).square().mean() for x in self.dis_a(fake_a)),
            "adversarial_B": sum((x - 1).square().mean() for x in self.dis_b(fake_b)),
            "reconstruction_A": 10 * (self.dec_a(latent_a) - a).abs().mean(),
            "reconstruction_B": 10 * (self.dec_b(latent_b) - b).abs().mean(),
            "kl_A": 0.01 * mean_a.square().mean(),
            "kl_B": 0.01 * mean_b.square().mean(),
            "cycle_A": 10 * (cycle_a - a).abs().mean(),
            "cycle_B": 10 * (cycle_b - b).abs().mean(),
            "kl_cycle_A": 0.01 * mean_aba.square().mean(),
            "kl_cycle_B": 0.01 * mean_bab.square().mean(),
        }
        generator = {f"generator/{name}": term for name, term in generator.items()}
        self.update(0, generator)
        return discriminator | generator

    def with_noise(self, mean: Tensor) -> Tensor:
        return mean + self.config.latent_noise * torch.randn(mean.shape, dtype=mean.dtype)

    def judge(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        return sum(
            (r - 1).square().mean() + f.square().mean()
            for r, f in zip(discriminator(real), discriminator(fake), strict=True)
        )

    def update(self, index: int, terms: Mapping[str, Tensor]) -> None:
        self.optimizers[index].zero_grad()
        sum(terms.values()).backward()
        self.optimizers[index].step()


def networks(recipe: UNIT) -> list[nn.Module]:
    """In the order of `PlainUNIT.networks`."""
    groups = (recipe.encoders, recipe.decoders, recipe.discriminators)
    return [network for group in groups for network in group.values()]


# --- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share_latent", [True, False])
def test_training_equals_the_one_written_with_plain_torch(share_latent: bool) -> None:
    config = dataclasses.replace(TINY, share_latent=share_latent, lr_decay_every=2)
    recipe, plain = UNIT(config).double(), PlainUNIT(config)
    randomise(recipe)
    copy_weights(networks(recipe), plain.networks)
    plain.begin()
    assert_same_training(
        recipe, plain.step, networks(recipe), plain.networks, size=16, batch_size=2
    )


def test_the_default_networks_are_those_of_the_public_code() -> None:
    recipe, plain = UNIT(UNITConfig()), PlainUNIT(UNITConfig())
    for ours, theirs in zip(networks(recipe), plain.networks, strict=True):
        shapes = [parameter.shape for parameter in theirs.parameters()]
        assert [parameter.shape for parameter in ours.parameters()] == shapes
    pictures = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        latents = recipe.encoders["A"](pictures)
        assert latents.shape == (1, 256, 16, 24)
        assert recipe.decoders["B"](latents).shape == pictures.shape
        logits = recipe.discriminators["A"](pictures)
        assert [scale.shape[2:] for scale in logits] == [(4, 6), (2, 3), (1, 1)]


def test_initial_weights() -> None:
    recipe = UNIT(UNITConfig(width=32))
    for network in (recipe.encoders["A"], recipe.decoders["B"]):
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                fan_in = module.weight[0].numel()
                assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
                assert module.bias is None or not module.bias.any()
    convolution = recipe.discriminators["B"].scales[2][4]
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not convolution.bias.any()


def test_learning_rate_halves_every_100_000_steps() -> None:
    recipe = UNIT(TINY)
    for phase in recipe.phases:
        settings = recipe.optimizer(phase)
        assert (settings.lr, settings.betas, settings.weight_decay) == (1e-4, (0.5, 0.999), 1e-4)
        for step, factor in ((0, 1), (99_999, 1), (100_000, 0.5), (350_000, 0.125)):
            assert recipe.lr_factor(phase, step, 10) == factor
    assert recipe.default_steps(10) == 1_000_000


# --- Shared latent space ------------------------------------------------------------------------


@pytest.mark.parametrize("share_latent", [True, False])
def test_shared_blocks_are_one(share_latent: bool) -> None:
    recipe = UNIT(dataclasses.replace(TINY, share_latent=share_latent))
    blocks = [
        [network.blocks for network in group.values()]
        for group in (recipe.encoders, recipe.decoders)
    ]
    (encoder_a, encoder_b), (decoder_a, decoder_b) = blocks
    assert (encoder_a[-1] is encoder_b[-1]) == share_latent
    assert (decoder_a[0] is decoder_b[0]) == share_latent
    assert encoder_a[0] is not encoder_b[0]
    assert decoder_a[-1] is not decoder_b[-1]


def test_a_loaded_recipe_averages_shared_blocks_too(tmp_path: Path) -> None:
    recipe = UNIT(TINY)
    average = {name: torch.randn_like(value) for name, value in recipe.named_parameters()}
    state = {
        "recipe": "unit",
        "config": {"recipe": to_json(TINY)},
        "networks": recipe.state_dict(),
        "average": average,
    }
    path = tmp_path / "unit.safetensors"
    checkpoint.save(path, state)
    loaded = load_recipe(path)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, average[name]), name


# --- Noise --------------------------------------------------------------------------------------


def test_noise_follows_the_seed_and_differs_between_pictures() -> None:
    recipe = UNIT(TINY)
    picture = torch.rand(1, 3, 16, 16)
    batch = {"A": picture.expand(2, -1, -1, -1), "B": picture.expand(2, -1, -1, -1)}
    torch.manual_seed(1)
    first = recipe.begin_step(batch).fakes
    torch.manual_seed(1)
    again = recipe.begin_step(batch).fakes
    other = recipe.begin_step(batch).fakes
    for domain in "AB":
        assert torch.equal(first[domain], again[domain])
        assert not torch.equal(first[domain], other[domain])
        assert not torch.equal(first[domain][0], first[domain][1])


def test_latents_spread_by_the_noise_asked_for() -> None:
    means = torch.zeros(4, 32, 16, 16)
    for noise in (1.0, 0.5):
        recipe = UNIT(dataclasses.replace(TINY, latent_noise=noise))
        assert recipe._sample(means).std().item() == pytest.approx(noise, rel=0.02)
    assert UNIT(dataclasses.replace(TINY, latent_noise=0.0))._sample(means) is means


@pytest.mark.parametrize("field", ["downsamplings", "lr_decay_every", "discriminator_scales"])
def test_settings_that_cannot_be_trained_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be at least 1, got 0"):
        UNITConfig(**{field: 0})


# --- Layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_norm(dtype: torch.dtype, offset: float, device: torch.device) -> None:
    x = (torch.randn(3, 6, 5, 7) + torch.randn(3, 6, 1, 1) + offset).to(device, dtype)
    norm = LayerNorm(6, activation="relu", reflect_pad=2).to(device, dtype)
    nn.init.normal_(norm.bias)
    plain = PlainLayerNorm(6).double().to(device)
    copy_weights([norm], [plain])
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    actual = norm(x)
    expected = torch.nn.functional.pad(plain(wide).relu(), (2, 2, 2, 2), mode="reflect")
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((actual * weights.to(dtype)).sum(), [x, *norm.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [wide, *plain.parameters()])
    scale = 1 + offset  # what subtracting the mean costs
    rounding = 4 if device.type == "cuda" else 1  # whose roots and quotients are approximate
    bound = {torch.float64: 1e-13, torch.float32: 1e-6}[dtype] * scale * rounding
    for got, wanted in zip([actual, *ours], [expected, *theirs], strict=True):
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error.item() <= bound


def test_layer_norm_of_one_value_has_finite_gradients() -> None:
    norm = LayerNorm(4)
    x = torch.full((2, 4, 8, 8), 0.3, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_discriminator_says_what_it_cannot_judge() -> None:
    judge = Discriminator(width=4, layers=3, scales=2)
    assert [scale.shape[2:] for scale in judge(torch.rand(1, 3, 16, 24))] == [(2, 3), (1, 1)]
    with pytest.raises(ValueError, match=r"at least 16 px .* 2 scales, got \[1, 3, 15, 24\]"):
        judge(torch.rand(1, 3, 15, 24))
