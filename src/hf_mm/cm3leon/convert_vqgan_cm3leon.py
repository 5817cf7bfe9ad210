"""Turns a VQGAN in its original layout, such as the one Chameleon and Anole were published with, into a `VQModel`.

python -m hf_mm.cm3leon.convert_vqgan_cm3leon vqgan.ckpt runs/chameleon_vq --sample_size 512

Knows the names and shapes of both layouts; whatever is not in the state dict follows from no guess but is an argument.
Chameleon's own `ChameleonVQVAE` in transformers has the encoder and the codes alone, and so cannot draw; with the
weights of the original decoder it becomes a `VQModel` that can.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors.torch import load_file
from transformers import ChameleonVQVAE


PREFIXES = ("model.vqmodel.", "vqmodel.", "model.", "")  # where the tokenizer was saved inside a larger model
NOT_NEEDED = ("loss.", "colorize")  # discriminator and perceptual network; colours of segmentation maps
RESNET_NAMES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
SAME_NAMES = re.compile(r"(quant_conv|post_quant_conv|(encoder|decoder)\.conv_(in|out))\.(weight|bias)")
OUTPUT_NORM = re.compile(r"(encoder|decoder)\.norm_out\.(weight|bias)")
MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d+)\.(\w+)\.(weight|bias)")
LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)\.(weight|bias)")
RESAMPLER = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(?:down|up)sample\.conv\.(weight|bias)")


def convert_vqgan_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, sample_size: int = 512, norm_num_groups: int = 32
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Maps an original VQGAN to the configuration and the weights of a `VQModel`.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Names such as `encoder.down.0.block.1.norm1.weight`, also behind
            `model.vqmodel.`; the weights of losses are left out.
        sample_size (`int`, defaults to 512): Pixels of a side that it was trained on; changes no weight.
        norm_num_groups (`int`, defaults to 32): Groups of its norms, which the original code fixes.

    Returns:
        `tuple[dict, dict]`: For `VQModel(**config)`, and for its `load_state_dict`.

    Raises:
        ValueError: If a part is missing, a name has no counterpart, or the parts are none that a `VQModel` has.

    Source: taming-transformers (arXiv 2012.09841) and Make-A-Scene (arXiv 2203.13131), whose layout Chameleon (arXiv
    2405.09818) kept.

    """
    weights = _strip_prefix(state_dict)
    config = _find_config(weights) | {"sample_size": sample_size, "norm_num_groups": norm_num_groups}
    num_levels = len(config["block_out_channels"])
    converted = {}
    for name, weight in weights.items():
        target = _translate(name, num_levels)
        is_attention = ".attentions." in target and weight.ndim == 4  # 1 x 1 convolutions, which are linear there
        converted[target] = weight[:, :, 0, 0] if is_attention else weight
    return config, converted


def build_vq_model(
    state_dict: Mapping[str, torch.Tensor], *, sample_size: int = 512, norm_num_groups: int = 32
) -> VQModel:
    """Builds the `VQModel` of an original VQGAN.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): See `convert_vqgan_state_dict`, as the other arguments.
        sample_size (`int`, defaults to 512): Pixels of a side that it was trained on.
        norm_num_groups (`int`, defaults to 32): Groups of its norms.

    Returns:
        `VQModel`: In evaluation mode, with the weights in their own type.

    Raises:
        ValueError: If the state dict is none that a `VQModel` can hold.

    """
    config, weights = convert_vqgan_state_dict(state_dict, sample_size=sample_size, norm_num_groups=norm_num_groups)
    with torch.device("meta"):
        vq = VQModel(**config)
    shapes = {name: weight.shape for name, weight in vq.state_dict().items()}
    missing, unexpected = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    wrong = sorted(name for name in shapes.keys() & weights.keys() if shapes[name] != weights[name].shape)
    if missing or unexpected or wrong:
        raise ValueError(
            f"`state_dict` is no VQGAN that a VQModel can hold: it lacks {missing[:3]} ({len(missing)} in all), has "
            f"{unexpected[:3]} too much ({len(unexpected)}), and other shapes for {wrong[:3]} ({len(wrong)}). Levels "
            "need equally many blocks, the decoder one more than the encoder, and attention at all blocks of a level."
        )
    vq.load_state_dict(weights, assign=True)
    return vq.eval()


def build_vq_model_from_chameleon(vqvae: ChameleonVQVAE, decoder_state_dict: Mapping[str, torch.Tensor]) -> VQModel:
    """Gives the image tokenizer of a transformers Chameleon the decoder that it lacks.

    Args:
        vqvae (`ChameleonVQVAE`): Such as `model.model.vqmodel`; its encoder and codes are taken, and those of the
            other state dict left.
        decoder_state_dict (`Mapping[str, torch.Tensor]`): Holds `decoder.*` in the original layout, and may hold the
            rest of the VQGAN.

    Returns:
        `VQModel`: In evaluation mode; its codes are those of the `ChameleonVQVAE`.

    Raises:
        ValueError: If there is no decoder, or it does not fit.

    """
    given = _strip_prefix(decoder_state_dict)
    decoder = {name: weight for name, weight in given.items() if name.startswith(("decoder.", "post_quant_conv."))}
    return build_vq_model({**vqvae.state_dict(), **decoder}, sample_size=vqvae.config.resolution)


def load_vqgan_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads the state dict of a VQGAN; code in a pickle is never run.

    Args:
        path (`str` or `Path`): A `.safetensors` file, or a checkpoint of PyTorch (Lightning).

    Returns:
        `dict[str, torch.Tensor]`.

    Raises:
        pickle.UnpicklingError: If a checkpoint holds anything but tensors and plain values.

    """
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded)


def _strip_prefix(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Finds the tokenizer in the state dict, drops what is not part of it, and names it as by itself."""
    prefixes = [prefix for prefix in PREFIXES if f"{prefix}decoder.conv_in.weight" in state_dict]
    if not prefixes:
        raise ValueError(
            f"`state_dict` has no `decoder.conv_in.weight` among its {len(state_dict)} names, such as "
            f"{list(state_dict)[:3]}. Give an original VQGAN with its decoder."
        )
    own = {
        name.removeprefix(prefixes[0]): weight for name, weight in state_dict.items() if name.startswith(prefixes[0])
    }
    return {name: weight for name, weight in own.items() if not name.startswith(NOT_NEEDED)}


def _find_config(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Reads the configuration of a `VQModel` off the names and shapes."""
    if missing := [name for name in ("encoder.conv_out.weight", "quantize.embedding.weight") if name not in weights]:
        raise ValueError(f"`state_dict` has no `{missing[0]}`. Give a whole VQGAN, with encoder, codes and decoder.")
    num_latent, num_decoded = len(weights["encoder.conv_out.weight"]), weights["decoder.conv_in.weight"].shape[1]
    if num_latent != num_decoded:
        raise ValueError(
            f"The encoder gives {num_latent} channels and the decoder takes {num_decoded}: a VQGAN with twice the "
            "channels (`double_z`) is no VQModel."
        )
    levels = sorted({int(found[1]) for name in weights if (found := re.match(r"encoder\.down\.(\d+)\.", name))})
    has_attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in levels]
    num_codes, code_length = weights["quantize.embedding.weight"].shape
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": len(weights["decoder.conv_out.weight"]),
        "block_out_channels": tuple(len(weights[f"encoder.down.{level}.block.0.conv2.weight"]) for level in levels),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in has_attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in has_attention[::-1]),
        "layers_per_block": sum(bool(re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", n)) for n in weights),
        "latent_channels": num_latent,
        "num_vq_embeddings": num_codes,
        "vq_embed_dim": code_length,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def _translate(name: str, num_levels: int) -> str:
    """Names a weight as diffusers does: levels of the decoder counted from the latent, and blocks by kind."""
    if name == "quantize.embedding.weight" or SAME_NAMES.fullmatch(name):
        return name
    if found := OUTPUT_NORM.fullmatch(name):
        return f"{found[1]}.conv_norm_out.{found[2]}"
    if found := RESAMPLER.fullmatch(name):
        kind = "downsamplers" if found[1] == "encoder" else "upsamplers"
        return f"{_name_level(found[1], int(found[2]), num_levels)}.{kind}.0.conv.{found[3]}"
    if found := MIDDLE.fullmatch(name):
        if part := _name_part(found[2], int(found[3]) - 1, found[4]):
            return f"{found[1]}.mid_block.{part}.{found[5]}"
    if found := LEVEL.fullmatch(name):
        if part := _name_part(found[3], int(found[4]), found[5]):
            return f"{_name_level(found[1], int(found[2]), num_levels)}.{part}.{found[6]}"
    raise ValueError(f"`state_dict` has `{name}`, which a VQModel has no counterpart for.")


def _name_level(side: str, level: int, num_levels: int) -> str:
    return f"encoder.down_blocks.{level}" if side == "encoder" else f"decoder.up_blocks.{num_levels - 1 - level}"


def _name_part(kind: str, number: int, layer: str) -> str | None:
    """Names a layer of a residual block or of an attention, or None where there is no such layer."""
    folder, names = ("resnets", RESNET_NAMES) if kind == "block" else ("attentions", ATTENTION_NAMES)
    return f"{folder}.{number}.{names[layer]}" if layer in names else None


def main(argv: Sequence[str] | None = None) -> None:
    """Converts a file into a folder that `VQModel.from_pretrained` opens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="VQGAN in its original layout, .safetensors or .ckpt.")
    parser.add_argument("output_dir", help="Folder for the VQModel.")
    parser.add_argument("--sample_size", type=int, default=512, help="Pixels of a side that it was trained on.")
    arguments = parser.parse_args(argv)
    vq = build_vq_model(load_vqgan_state_dict(arguments.checkpoint), sample_size=arguments.sample_size)
    vq.save_pretrained(arguments.output_dir)
    print(f"A VQModel of {vq.config.num_vq_embeddings} codes is in {arguments.output_dir}.")


if __name__ == "__main__":
    main()
