"""The training loop as a textbook writes it, on the public names alone."""

import torch

import fastgan
from fastgan.models import (
    ContentEncoder,
    Decoder,
    Discriminator,
    RandomFeatures,
    StyleEncoder,
    StyleTransferModule,
)


def test_five_modules_two_optimizers_three_losses():
    torch.manual_seed(0)
    content_encoder = ContentEncoder()
    style_encoder = StyleEncoder()
    style_transfer = StyleTransferModule()
    decoder = Decoder()
    discriminator = Discriminator()
    extractor = RandomFeatures()

    generator_parameters = [
        *content_encoder.parameters(),
        *style_encoder.parameters(),
        *style_transfer.parameters(),
        *decoder.parameters(),
    ]
    generator_optimizer = torch.optim.Adam(generator_parameters, lr=1e-3)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)

    content = torch.rand(2, 3, 64, 64) * 2 - 1
    style = torch.rand(2, 3, 64, 64).round() * 2 - 1
    totals, discriminator_losses = [], []
    for _ in range(12):
        fake = decoder(style_transfer(content_encoder(content), style_encoder(style)))

        discriminator_optimizer.zero_grad()
        loss = fastgan.discriminator_loss(discriminator(style), discriminator(fake.detach()))
        loss.backward()
        discriminator_optimizer.step()
        discriminator_losses.append(loss.item())

        generator_optimizer.zero_grad()
        features = extractor(fake)
        grams = [fastgan.gram_matrix(f) for f in extractor(style)]
        total = (
            fastgan.content_loss(features, extractor(content))
            + 1e3 * fastgan.style_loss(features, grams)
            + 0.1 * fastgan.generator_loss(discriminator(fake))
        )
        total.backward()
        generator_optimizer.step()
        totals.append(total.item())

    assert totals[-1] < totals[0]
    assert discriminator_losses[-1] < discriminator_losses[0]
