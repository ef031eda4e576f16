"""The style transfer recipe: its objectives against the written formulas, its options."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.metrics import gram_distance, structure_correlation
from fastgan.models.features import RandomFeatures, grey
from fastgan.recipes import recipe_class
from fastgan.recipes.style_transfer import StyleTransfer, StyleTransferRecipeConfig
from tolerances import assert_close

SMALL = StyleTransferRecipeConfig(
    width=4, encoder_blocks=1, decoder_blocks=1, discriminator_width=4, extractor_levels=3
)


def prepare(**options) -> tuple[StyleTransfer, dict[str, Tensor]]:
    """The recipe and a batch, in fp64."""
    recipe = StyleTransfer(dataclasses.replace(SMALL, **options))
    recipe.begin_training(48)
    recipe.double()
    batch = {name: torch.rand(2, 3, 48, 40, dtype=torch.float64) * 2 - 1 for name in recipe.domains}
    return recipe, batch


def generator_terms(recipe: StyleTransfer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return recipe.losses("generator", batch, recipe.begin_step(batch))


def maps(recipe: StyleTransfer, images: Tensor) -> list[np.ndarray]:
    return [m.detach().flatten(2).numpy() for m in recipe.extractor(images)]


def gram_distances(recipe: StyleTransfer, batch: dict[str, Tensor], fake: Tensor) -> np.ndarray:
    """||G - T||^2 and ||T||^2 of Gram matrices divided by C·H·W: [layer, 2, picture]."""
    distances = []
    for f, t in zip(maps(recipe, fake), maps(recipe, batch["style"]), strict=True):
        g, t = (np.einsum("bcm,bdm->bcd", x, x) / (x.shape[1] * x.shape[2]) for x in (f, t))
        distances.append([((g - t) ** 2).sum((1, 2)), (t**2).sum((1, 2))])
    return np.array(distances)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- Textbook objective -------------------------------------------------------------------------


def test_textbook_objective_equals_the_written_formulas():
    recipe, batch = prepare(
        objective="textbook",
        weight_content=0.7,
        weight_style=30.0,
        weight_adversarial=0.2,
        weight_texture=9.0,
        weight_identity=9.0,
        weight_statistics=9.0,
        weight_variation=9.0,
        gan_mode="hinge",
        label_smoothing=0.1,
    )
    scratch = recipe.begin_step(batch)
    terms = recipe.losses("generator", batch, scratch)
    assert list(terms) == ["content", "style", "adversarial"]

    content = sum(
        ((f - c) ** 2).sum((1, 2)).mean() / f.shape[1]
        for layer, (f, c) in enumerate(
            zip(maps(recipe, scratch.fake), maps(recipe, batch["content"]), strict=True)
        )
        if layer in recipe.config.content_layers
    )
    assert_close(terms["content"], torch.tensor(0.7 * content))

    style = (gram_distances(recipe, batch, scratch.fake)[:, 0].mean(1) / 4).sum()
    assert_close(terms["style"], torch.tensor(30.0 * style))

    fake = [x.detach().numpy() for x in recipe.discriminator(scratch.fake)]
    real = [x.detach().numpy() for x in recipe.discriminator(batch["style"])]
    minimax = sum(np.log(1 - sigmoid(f)).mean() for f in fake)
    assert_close(terms["adversarial"], torch.tensor(0.2 * minimax))

    (discriminator,) = recipe.losses("discriminator", batch, scratch).values()
    cross_entropy = sum(
        -np.log(sigmoid(r)).mean() - np.log(1 - sigmoid(f)).mean()
        for r, f in zip(real, fake, strict=True)
    )
    assert_close(discriminator, torch.tensor(cross_entropy))


# --- Default objective --------------------------------------------------------------------------


def test_relative_style_loss_is_squared_distance_over_squared_norm():
    recipe, batch = prepare(weight_style=2.0)
    scratch = recipe.begin_step(batch)
    distances = gram_distances(recipe, batch, scratch.fake).sum(2)
    expected = (distances[:, 0] / distances[:, 1]).sum()
    terms = recipe.losses("generator", batch, scratch)
    assert_close(terms["style"], torch.tensor(2.0 * expected))


def test_texture_loss_is_the_style_loss_of_grey_pictures():
    recipe, batch = prepare(weight_texture=3.0)
    scratch = recipe.begin_step(batch)
    distances = gram_distances(recipe, {"style": grey(batch["style"])}, grey(scratch.fake)).sum(2)
    expected = (distances[:, 0] / distances[:, 1]).sum()
    terms = recipe.losses("generator", batch, scratch)
    assert_close(terms["texture"], torch.tensor(3.0 * expected))


def test_absolute_style_loss():
    recipe, batch = prepare(style_scale="absolute", weight_style=3.0)
    scratch = recipe.begin_step(batch)
    expected = 3 / 4 * gram_distances(recipe, batch, scratch.fake)[:, 0].mean(1).sum()
    terms = recipe.losses("generator", batch, scratch)
    assert_close(terms["style"], torch.tensor(expected))


def test_grey_content_loss_leaves_brightness_contrast_and_tint_to_the_style():
    recipe, batch = prepare()
    tinted = batch["content"] * 0.4 + torch.tensor([0.3, 0.0, -0.2]).view(1, 3, 1, 1)
    features, others = (recipe.extractor(grey(images)) for images in (tinted, batch["style"]))
    same = recipe._content_loss(batch["content"], tinted, features)
    other = recipe._content_loss(batch["content"], batch["style"], others)
    assert same < 1e-4 * other
    coloured, batch = prepare(content_grey=False)
    features = coloured.extractor(tinted)
    assert coloured._content_loss(batch["content"], tinted, features) > 0.1 * other


def test_weights_are_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(SMALL, extractor="vgg19", extractor_weights="vgg.pth")
    assert config.extractor_weights == str(tmp_path / "vgg.pth")


def test_encoder_content_loss_compares_normalised_features():
    recipe, batch = prepare(content_features="encoder")
    same = recipe._content_loss(batch["content"], batch["content"], [])
    assert same == 0
    fake = batch["style"].clone().requires_grad_()
    loss = recipe._content_loss(batch["content"], fake, [])
    encoded = [recipe.generator.content_encoder(x) for x in (fake, batch["content"])]
    ours, theirs = (F.instance_norm(x, eps=1e-5) for x in encoded)
    torch.testing.assert_close(loss, F.mse_loss(ours, theirs))
    (grad,) = torch.autograd.grad(loss, fake)
    (expected,) = torch.autograd.grad(F.mse_loss(ours, theirs.detach()), fake)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("mode", "fake_loss"),
    [
        ("bce", lambda f: np.log1p(np.exp(-f))),
        ("lsgan", lambda f: (f - 1) ** 2),
        ("hinge", lambda f: -f),
        ("wgan", lambda f: -f),
    ],
)
def test_adversarial_modes(mode, fake_loss):
    recipe, batch = prepare(gan_mode=mode, weight_adversarial=0.5)
    scratch = recipe.begin_step(batch)
    logits = recipe.discriminator(scratch.fake)
    expected = 0.5 * sum(fake_loss(x.detach().numpy()).mean() for x in logits)
    terms = recipe.losses("generator", batch, scratch)
    assert_close(terms["adversarial"], torch.tensor(expected))


def test_optional_terms_equal_their_definitions():
    recipe, batch = prepare(
        weight_identity=2.0, weight_statistics=3.0, weight_variation=4.0, weight_reconstruction=5.0
    )
    scratch = recipe.begin_step(batch)
    terms = recipe.losses("generator", batch, scratch)

    model = recipe.generator
    style, content = (batch[k][..., :24, :20] for k in ("style", "content"))
    assert_close(terms["identity"], 2 * (model(style, style) - style).abs().mean(), torch.float32)
    decoded = model(content, style, alpha=0.0)
    assert_close(terms["reconstruction"], 5 * (decoded - content).abs().mean(), torch.float32)

    statistics = 0.0
    for f, t in zip(maps(recipe, scratch.fake), maps(recipe, batch["style"]), strict=True):
        std_f, std_t = (np.sqrt(x.var(2, ddof=1) + 1e-5) for x in (f, t))
        statistics += ((f.mean(2) - t.mean(2)) ** 2).mean() + ((std_f - std_t) ** 2).mean()
    assert_close(terms["statistics"], torch.tensor(3 * statistics))

    image = scratch.fake.detach().numpy()
    variation = sum(np.abs(np.diff(image, axis=axis)).mean() for axis in (2, 3))
    assert_close(terms["variation"], torch.tensor(4 * variation), torch.float32)


def test_strength_term_wants_the_cross_fade():
    recipe, batch = prepare(weight_strength=3.0)
    drawn = recipe.draw(7, 2, torch.Generator().manual_seed(0))
    assert drawn["strength"].shape == (2,)
    strength = batch["strength"] = torch.tensor([0.25, 0.75], dtype=torch.float64)
    loss = generator_terms(recipe, batch)["strength"]
    style, content = (batch[k][..., :24, :20] for k in ("style", "content"))
    apart = 0.0
    for one, alpha in enumerate(strength.tolist()):
        pair = content[one : one + 1], style[one : one + 1]
        target = (1 - alpha) * pair[0] + alpha * recipe.generator(*pair).detach()
        apart = apart + (recipe.generator(*pair, alpha=alpha) - target).abs().mean() / 2
    assert_close(loss, 3 * apart, torch.float32)
    expected = torch.autograd.grad(3 * apart, recipe.generator.parameters(), allow_unused=True)
    actual = torch.autograd.grad(loss, recipe.generator.parameters(), allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float32)  # the full result is a target, not a thing to change


def test_terms_without_weight_are_not_computed():
    recipe, batch = prepare(weight_reconstruction=0.0, weight_texture=0.0)
    assert list(generator_terms(recipe, batch)) == ["content", "style", "adversarial"]
    assert recipe.draw(0, 2, torch.Generator()) == {}


# --- The trainer's contract ---------------------------------------------------------------------


def test_phases_train_their_own_networks_alone():
    recipe, batch = prepare()
    for phase, (network,) in {p: recipe.networks(p) for p in recipe.phases}.items():
        others = {n: p for n, p in recipe.named_parameters() if not n.startswith(phase)}
        for parameter in others.values():
            parameter.requires_grad_(False)
        scratch = recipe.begin_step(batch)
        sum(recipe.losses(phase, batch, scratch).values()).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
        recipe.requires_grad_(True)
        recipe.zero_grad()


def test_training_brings_results_nearer_to_the_style_and_keeps_content():
    """Judged by other random features than those it was trained against, texture apart too."""
    recipe, _ = prepare(width=8, weight_adversarial=0.0)
    recipe.float()
    content = F.interpolate(torch.rand(2, 3, 6, 6), scale_factor=8, mode="bilinear") * 2 - 1
    stripes = torch.arange(48).div(3, rounding_mode="floor") % 2 * 2.0 - 1
    style = (stripes * torch.tensor([0.9, 0.4, -0.5]).view(1, 3, 1, 1)).expand(2, 3, 48, 48)
    optimizer = torch.optim.Adam(recipe.generator.parameters(), recipe.config.lr)
    for _ in range(50):
        optimizer.zero_grad()
        sum(generator_terms(recipe, {"content": content, "style": style}).values()).backward()
        optimizer.step()
    result = recipe.stylize(content, style)
    judge = RandomFeatures(levels=3, seed=7)
    before, after = (gram_distance(images, style, judge) for images in (content, result))
    assert (after < 0.7 * before).all()
    before, after = (
        gram_distance(grey(images), grey(style), judge) for images in (content, result)
    )
    assert (after < 0.5 * before).all()
    own = structure_correlation(result, content)
    other = structure_correlation(result, content.flip(0))
    assert (own > other + 0.3).all()


def test_metrics_tell_how_sure_the_discriminator_is():
    recipe, batch = prepare()
    scratch = recipe.begin_step(batch)
    recipe.losses("discriminator", batch, scratch)
    metrics = recipe.metrics(batch, scratch)
    real = torch.cat([x.flatten() for x in recipe.discriminator(batch["style"])])
    accuracy = (real > 0).double().mean()
    assert metrics["discriminator/real_accuracy"].item() == pytest.approx(accuracy.item())
    assert all(not value.requires_grad for value in metrics.values())


def test_checkpoint_holds_the_networks_and_not_the_extractor():
    recipe = StyleTransfer(SMALL)
    names = set(recipe.state_dict())
    assert all(name.startswith(("generator.", "discriminator.")) for name in names)
    same = StyleTransfer(SMALL)
    same.load_state_dict(recipe.state_dict())
    content, style = torch.rand(1, 3, 17, 23), torch.rand(1, 3, 30, 30)
    result = recipe.stylize(content, style, alpha=0.5)
    assert result.shape == content.shape
    assert torch.equal(result, same.stylize(content, style, alpha=0.5))
    with pytest.raises(ValueError, match="needs a style picture"):
        recipe.stylize(content)


def test_sample_columns():
    recipe, batch = prepare()
    columns = recipe.samples(batch)
    assert list(columns) == ["content", "style", "result"]
    assert torch.equal(columns["result"], recipe.stylize(batch["content"], batch["style"]))


def test_learning_rates():
    recipe, _ = prepare(lr=1e-3, lr_discriminator=2e-3, lr_hold=50, lr_decay=0.01, beta1=0.4)
    assert recipe.optimizer("generator").lr == 1e-3
    assert recipe.optimizer("discriminator").lr == 2e-3
    assert recipe.optimizer("discriminator").betas == (0.4, 0.999)
    assert recipe.lr_factor("generator", 50, 7) == 1
    assert math.isclose(recipe.lr_factor("discriminator", 150, 7), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_fp32_and_finite_under_autocast(dtype: torch.dtype):
    recipe, batch = prepare(
        weight_identity=1.0, weight_strength=1.0, weight_statistics=1.0, weight_variation=1.0
    )
    recipe.float()
    batch = {name: images.float() for name, images in batch.items()}
    batch["strength"] = torch.tensor([0.3, 0.8])
    with torch.autocast("cpu", dtype=dtype):
        scratch = recipe.begin_step(batch)
        terms = [recipe.losses(phase, batch, scratch) for phase in recipe.phases]
    reference = recipe.begin_step(batch)
    for phase, under_autocast in zip(recipe.phases, terms, strict=True):
        expected = recipe.losses(phase, batch, reference)
        for name, term in under_autocast.items():
            assert term.dtype == torch.float32, name
            assert math.isclose(term.item(), expected[name].item(), rel_tol=0.1), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "text"}, "^objective must be one of default, textbook, got 'text'"),
        ({"width": 0}, "^width must be at least 1, got 0"),
        ({"encoder_blocks": -1}, "^encoder_blocks must be at least 0, got -1"),
        ({"weight_style": -1.0}, "^weight_style must be at least 0, got -1"),
        ({"lr_discriminator": math.nan}, "^lr_discriminator must be at least 0, got nan"),
        ({"content_layers": (0, 3)}, r"^content_layers .* 3 maps, 0 to 2, got \(0, 3\)"),
        ({"content_layers": ()}, "^content_layers"),
        ({"content_layers": (4,), "extractor": "vgg19"}, "^content_layers .* 4 maps"),
        (
            {"content_layers": (4,), "content_features": "encoder", "objective": "textbook"},
            "^content_layers",
        ),
        ({"label_smoothing": 1.0}, r"^label_smoothing must be in \[0, 1\), got 1"),
        ({"label_smoothing": 0.1, "gan_mode": "hinge"}, "^label_smoothing needs gan_mode bce"),
        ({"saturating": True, "gan_mode": "lsgan"}, "^saturating needs gan_mode bce, got lsgan"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_content_layers_matter_only_where_they_are_read():
    dataclasses.replace(SMALL, content_layers=(), content_features="encoder")


@pytest.mark.parametrize("value", ["3", None])
def test_a_size_that_is_no_number_is_named(value: Any):
    with pytest.raises(TypeError, match=r"^width must be a number, got"):
        dataclasses.replace(SMALL, width=value)


def test_crops_too_small_for_the_discriminator_are_refused():
    with pytest.raises(ValueError, match=r"^size: style_transfer needs at least 32 px .* got 31"):
        StyleTransfer(SMALL).begin_training(31)


def test_presets_are_sized_for_their_machines():
    lite, base = (StyleTransfer.presets[name] for name in ("lite", "base"))
    assert next(iter(StyleTransfer.presets)) == "lite"
    assert recipe_class("style-transfer") is StyleTransfer
    assert base.config.width > lite.config.width
    assert base.size > lite.size
