from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import ResNetBackbone, ResNetConfig

from hf_mm.training.image_tokenizer import (
    FeatureDistance,
    ImageTokenizerTrainer,
    ImageTokenizerWeights,
    PatchDiscriminator,
    load_feature_distance,
)
from hf_mm.training.image_tokenizer_codecs import KLCodec, measure_latent_scale


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=20,
    )


def make_trainer(**distances: nn.Module) -> ImageTokenizerTrainer:
    torch.manual_seed(0)
    codec, discriminator = KLCodec(make_vae()), PatchDiscriminator(8, 1)
    return ImageTokenizerTrainer(codec, discriminator, ImageTokenizerWeights(), **distances)


def make_batch(num_images: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand((num_images, 3, 20, 28), generator=generator) * 2 - 1
    return {"pixel_values": pixels, "latent_noise": torch.randn((num_images, 3, 10, 14), generator=generator)}


def make_backbone() -> ResNetBackbone:
    return ResNetBackbone(ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"))


def gradient_sizes(trainer: ImageTokenizerTrainer, loss: torch.Tensor) -> tuple[float, float]:
    trainer.zero_grad()
    loss.backward()
    players = trainer.codec, trainer.discriminator
    return tuple(
        sum(p.grad.abs().sum().item() for p in player.parameters() if p.grad is not None) for player in players
    )


def test_each_loss_reaches_only_its_own_player() -> None:
    trainer, weight = make_trainer(), torch.tensor(0.5)
    codec, discriminator = gradient_sizes(trainer, trainer(**make_batch(), adversarial_weight=weight).generator_loss)
    assert codec > 0 and discriminator == 0
    codec, discriminator = gradient_sizes(
        trainer, trainer(**make_batch(), adversarial_weight=weight).discriminator_loss
    )
    assert codec == 0 and discriminator > 0


def test_one_backward_gives_each_player_the_gradient_of_its_own_turn() -> None:
    trainer, batch, weight = make_trainer(), make_batch(), torch.tensor(0.3)
    trainer(**batch, adversarial_weight=weight).loss.backward()
    together = [p.grad.clone() for p in trainer.parameters()]
    trainer.zero_grad()
    trainer.discriminator.requires_grad_(False)
    ours, kl = trainer.codec(**batch)
    l1 = (ours - batch["pixel_values"]).abs().mean()
    (l1 + 1e-6 * kl.mean() - 0.3 * trainer.discriminator(ours).mean()).backward()
    trainer.discriminator.requires_grad_(True)
    real, fake = trainer.discriminator(batch["pixel_values"]), trainer.discriminator(ours.detach())
    (0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())).backward()
    for first, second in zip(together, (p.grad for p in trainer.parameters()), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_without_an_adversarial_weight_the_discriminator_rests() -> None:
    trainer = make_trainer()
    output = trainer(**make_batch())
    assert output.generator_loss is None and output.discriminator_loss is None and output.perceptual_loss is None
    assert gradient_sizes(trainer, output.loss)[1] == 0


def test_micro_batches_add_up_to_the_batch() -> None:
    trainer, batch = make_trainer(perceptual_distance=FeatureDistance(make_backbone())), make_batch(5)
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(2), slice(2, 5))]
    options = {"num_images_in_batch": torch.tensor(5), "adversarial_weight": torch.tensor(0.5)}
    whole = trainer(**batch, **options)
    split = [trainer(**part, **options) for part in parts]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(output[name] for output in split), rtol=1e-5, atol=1e-6)
    assert whole.perceptual_loss > 0 and whole.identity_loss is None


def test_feature_distance_is_zero_for_the_same_image_and_stays_frozen() -> None:
    distance, pixels = FeatureDistance(make_backbone()), make_batch(2)["pixel_values"]
    assert distance(pixels, pixels).abs().max() == 0
    assert (distance(pixels, pixels.flip(-1)) > 0).all() and distance(pixels, pixels).shape == (2,)
    distance.train()
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_feature_network_is_loaded_from_safetensors_and_never_from_a_pickle(tmp_path: Path) -> None:
    backbone = make_backbone()
    backbone.save_pretrained(tmp_path)
    distance = load_feature_distance(str(tmp_path))
    assert len(distance.backbone(make_batch(2)["pixel_values"]).feature_maps) == 2
    torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_feature_distance(str(tmp_path))


def test_noise_of_latents_is_scaled_and_none_of_it_leaves_the_mean() -> None:
    vae, batch = make_vae().eval(), make_batch(2)
    posterior = vae.encode(batch["pixel_values"]).latent_dist
    for share in (0.0, 0.3):
        expected = vae.decode(posterior.mean + share * posterior.std * batch["latent_noise"]).sample
        torch.testing.assert_close(KLCodec(vae, share)(**batch)[0], expected)
    assert not torch.allclose(KLCodec(vae, 0.3)(**batch)[0], KLCodec(vae)(**batch)[0])


def test_measured_scale_gives_latents_unit_deviation() -> None:
    vae, generator = make_vae().eval(), torch.Generator().manual_seed(2)
    images = torch.rand((40, 3, 20, 28), generator=generator) * 2 - 1
    scale = measure_latent_scale(vae, images.split(7))
    sampled = vae.encode(images).latent_dist.sample(generator) * scale
    assert sampled.std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="`images` gave 0 latent values"):
        measure_latent_scale(vae, [])
