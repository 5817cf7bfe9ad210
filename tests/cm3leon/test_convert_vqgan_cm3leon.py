from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import ChameleonVQVAE
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

from hf_mm.cm3leon.convert_vqgan_cm3leon import (
    build_vq_model,
    build_vq_model_from_chameleon,
    convert_vqgan_state_dict,
    load_vqgan_state_dict,
    main,
)


Weights = dict[str, torch.Tensor]
NUM_CODES, LATENT_CHANNELS, CODE_LENGTH, SIDE = 29, 7, 5, 16


def make_vqvae(**fields: object) -> ChameleonVQVAE:
    torch.manual_seed(0)
    settings = {
        "resolution": SIDE, "base_channels": 32, "channel_multiplier": (1, 2, 3), "num_res_blocks": 2,
        "latent_channels": LATENT_CHANNELS, "embed_dim": CODE_LENGTH, "num_embeddings": NUM_CODES,
    }  # fmt: skip
    vqvae = ChameleonVQVAE(ChameleonVQVAEConfig(**(settings | fields)))
    for weight in vqvae.parameters():  # norms and biases start at 1 and 0, where swapped ones go unseen
        torch.nn.init.normal_(weight, 0.0, 0.1) if weight.ndim > 1 else torch.nn.init.normal_(weight, 0.5, 0.5)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    return vqvae.eval()


def decoder_weights(
    config: ChameleonVQVAEConfig, attention_levels: tuple[int, ...] = (), device: str = "cpu"
) -> Weights:
    """Random weights of the decoder, by the names and shapes of the original code."""
    weights = {}

    def add(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = torch.randn(shape, device=device) * (0.1 if len(shape) > 1 else 1)
        weights[f"{name}.bias"] = torch.randn(shape[:1], device=device) * 0.5

    def add_resnet(name: str, width: int, new_width: int) -> None:
        add(f"{name}.norm1", width)
        add(f"{name}.conv1", new_width, width, 3, 3)
        add(f"{name}.norm2", new_width)
        add(f"{name}.conv2", new_width, new_width, 3, 3)
        if width != new_width:
            add(f"{name}.nin_shortcut", new_width, width, 1, 1)

    def add_attention(name: str, width: int) -> None:
        add(f"{name}.norm", width)
        for layer in ("q", "k", "v", "proj_out"):
            add(f"{name}.{layer}", width, width, 1, 1)

    widths = [config.base_channels * factor for factor in config.channel_multiplier]
    width = widths[-1]
    add("decoder.conv_in", width, config.latent_channels, 3, 3)
    add_resnet("decoder.mid.block_1", width, width)
    if config.attn_type == "vanilla":
        add_attention("decoder.mid.attn_1", width)
    add_resnet("decoder.mid.block_2", width, width)
    for level in reversed(range(len(widths))):
        for number in range(config.num_res_blocks + 1):
            add_resnet(f"decoder.up.{level}.block.{number}", width, widths[level])
            width = widths[level]
            if level in attention_levels:
                add_attention(f"decoder.up.{level}.attn.{number}", width)
        if level > 0:
            add(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    add("decoder.norm_out", width)
    add("decoder.conv_out", 3, width, 3, 3)
    return weights


def decode_as_published(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """The decoder of taming-transformers, written out: latents `(N, c, h, w)` after `post_quant_conv` to pixels."""

    def layer(function: Callable, name: str, inputs: torch.Tensor, **options: int) -> torch.Tensor:
        return function(inputs, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def norm(name: str, inputs: torch.Tensor) -> torch.Tensor:
        return F.group_norm(inputs, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def resnet(name: str, inputs: torch.Tensor) -> torch.Tensor:
        inner = layer(F.conv2d, f"{name}.conv1", F.silu(norm(f"{name}.norm1", inputs)), padding=1)
        inner = layer(F.conv2d, f"{name}.conv2", F.silu(norm(f"{name}.norm2", inner)), padding=1)
        if f"{name}.nin_shortcut.weight" in weights:
            inputs = layer(F.conv2d, f"{name}.nin_shortcut", inputs)
        return inputs + inner

    def attention(name: str, inputs: torch.Tensor) -> torch.Tensor:
        if f"{name}.q.weight" not in weights:
            return inputs
        normed = norm(f"{name}.norm", inputs)
        query, key, value = (layer(F.conv2d, f"{name}.{part}", normed).flatten(2) for part in "qkv")  # (N, c, h * w)
        shares = (query.transpose(1, 2) @ key * query.shape[1] ** -0.5).softmax(dim=-1)
        mixed = (value @ shares.transpose(1, 2)).view_as(inputs)
        return inputs + layer(F.conv2d, f"{name}.proj_out", mixed)

    hidden = layer(F.conv2d, "decoder.conv_in", hidden, padding=1)
    hidden = resnet("decoder.mid.block_1", hidden)
    hidden = resnet("decoder.mid.block_2", attention("decoder.mid.attn_1", hidden))
    num_levels = len({name.split(".")[2] for name in weights if name.startswith("decoder.up.")})
    for level in reversed(range(num_levels)):
        number = 0
        while f"decoder.up.{level}.block.{number}.conv1.weight" in weights:
            hidden = resnet(f"decoder.up.{level}.block.{number}", hidden)
            hidden = attention(f"decoder.up.{level}.attn.{number}", hidden)
            number += 1
        if level > 0:
            hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
            hidden = layer(F.conv2d, f"decoder.up.{level}.upsample.conv", hidden, padding=1)
    return layer(F.conv2d, "decoder.conv_out", F.silu(norm("decoder.norm_out", hidden)), padding=1)


def vqgan(vqvae: ChameleonVQVAE, attention_levels: tuple[int, ...] = ()) -> Weights:
    return {**vqvae.state_dict(), **decoder_weights(vqvae.config, attention_levels)}


@pytest.mark.parametrize(
    ("fields", "attention_levels"),
    [({}, ()), ({"attn_type": "none"}, ()), ({"attn_resolutions": [SIDE // 2]}, (1,))],
    ids=["published", "no_attention", "attention_in_a_level"],
)
@torch.no_grad()
def test_converted_model_computes_what_the_original_does(fields: dict, attention_levels: tuple[int, ...]) -> None:
    vqvae = make_vqvae(**fields)
    weights = vqgan(vqvae, attention_levels)
    vq = build_vq_model(weights, sample_size=SIDE)
    pixels = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    theirs, latents = vqvae.encode(pixels), vq.encode(pixels).latents
    assert torch.allclose(latents, vqvae.quant_conv(theirs.last_hidden_state), atol=1e-5)
    entries, _, (_, _, codes) = vq.quantize(latents)
    assert torch.equal(codes, theirs.image_tokens) and len(codes.unique()) > 1
    hidden = F.conv2d(entries, weights["post_quant_conv.weight"], weights["post_quant_conv.bias"])
    wanted = decode_as_published(weights, hidden)
    assert torch.allclose(vq.decode(latents).sample, wanted, atol=1e-4 * wanted.abs().max())
    assert vq.decode(latents).sample.shape == pixels.shape and vq.config.sample_size == SIDE


def test_published_size_is_read_off_the_names_and_shapes() -> None:
    with torch.device("meta"):
        vqvae = ChameleonVQVAE(ChameleonVQVAEConfig())
    decoder = decoder_weights(vqvae.config, device="meta")
    found, _ = convert_vqgan_state_dict({**vqvae.state_dict(), **decoder})
    assert found["block_out_channels"] == (128, 128, 256, 256, 512) and found["layers_per_block"] == 2
    assert (found["num_vq_embeddings"], found["vq_embed_dim"], found["latent_channels"]) == (8192, 256, 256)
    assert found["mid_block_add_attention"] and set(found["down_block_types"]) == {"DownEncoderBlock2D"}
    vq = build_vq_model_from_chameleon(vqvae, decoder)
    assert vq.config.sample_size == 512


@torch.no_grad()
def test_chameleon_gets_the_decoder_and_keeps_its_own_codes() -> None:
    vqvae = make_vqvae()
    other = {name: torch.zeros_like(weight) for name, weight in vqvae.state_dict().items()}
    other |= {"post_quant_conv.weight": torch.randn(LATENT_CHANNELS, CODE_LENGTH, 1, 1), "loss.logvar": torch.ones(1)}
    decoder = {**other, **decoder_weights(vqvae.config)}
    vq = build_vq_model_from_chameleon(vqvae, {f"model.vqmodel.{name}": weight for name, weight in decoder.items()})
    assert torch.equal(vq.quantize.embedding.weight, vqvae.quantize.embedding.weight)
    assert torch.equal(vq.encoder.conv_in.weight, vqvae.encoder.conv_in.weight)
    assert torch.equal(vq.post_quant_conv.weight, other["post_quant_conv.weight"])


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_file_is_converted_to_a_folder_that_opens(suffix: str, tmp_path: Path) -> None:
    weights, path = (
        {**vqgan(make_vqvae()), "loss.discriminator.main.0.weight": torch.ones(2)},
        tmp_path / f"a.{suffix}",
    )
    save_file(weights, path) if suffix == "safetensors" else torch.save({"state_dict": weights, "epoch": 3}, path)
    main([str(path), str(tmp_path / "vq"), "--sample_size", str(SIDE)])
    vq, wanted = VQModel.from_pretrained(tmp_path / "vq", use_safetensors=True), build_vq_model(weights)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(vq.parameters(), wanted.parameters(), strict=True))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "trapped",)

    torch.save({"state_dict": {}, "callbacks": Trap()}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_vqgan_state_dict(tmp_path / "a.ckpt")
    assert not (tmp_path / "trapped").exists()


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if not name.startswith(part)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("decoder."), "no `decoder.conv_in.weight` among its"),
        (without("quantize."), "no `quantize.embedding.weight`. Give a whole VQGAN"),
        (without("decoder.up.1.block.2.conv2"), r"lacks \['decoder.up_blocks.1.resnets.2.conv2.bias'"),
        (
            lambda w: w | {"encoder.mid.block_1.extra.weight": torch.ones(1)},
            "`encoder.mid.block_1.extra.weight`, which",
        ),
        (lambda w: w | {"encoder.conv_out.weight": torch.ones(14, 96, 3, 3)}, "gives 14 channels .* takes 7"),
        (lambda w: w | {"quant_conv.weight": torch.ones(4, 7, 1, 1)}, r"other shapes for \['quant_conv.weight'\]"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused_by_name(change: Callable[[Weights], Weights], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vq_model(change(vqgan(make_vqvae())))
