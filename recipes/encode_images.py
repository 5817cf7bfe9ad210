"""Encodes the images of a recipe's rows once, so that training reads latents, codes or pixels and never a picture.

accelerate launch recipes/encode_images.py --dataset_name my/pictures --text_column caption --image_size 256 \
    --image_tokenizer_name runs/my_vae --output_dir runs/encoded
accelerate launch recipes/encode_images.py --dataset_name icon_scenes:shapes --image_size 32 \
    --image_tokenizer_name runs/vq_tiny --output_dir runs/codes
accelerate launch recipes/encode_images.py --dataset_name icon_scenes:shapes --image_size 32 --output_dir runs/pixels

The tokenizer is an `AutoencoderKL`, whose rows are latents, or any `VQModel`, whose rows are `codes`.

Every process that accelerate starts encodes its share; the same command finishes what was cut off, in any number of
processes. Train on the result with `--dataset_name runs/encoded`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from diffusers import AutoencoderKL, VQModel

from hf_mm.cm3leon.image_codes_cm3leon import full_precision
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.fingerprints import digest_encoder
from hf_mm.data.image_encoding import Encoder, encode_rows, raw_pixels
from hf_mm.data.pictures import TrainingPictures
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.data.text_tokenizer import load_text_tokenizer
from hf_mm.training.image_tokenizer_arguments import find_latent_shape
from hf_mm.training.image_tokenizer_codecs import find_codes, measure_latent_scale
from hf_mm.training.patch_codes import read_patches
from hf_mm.training.recipe import end_processes, parse_recipe, start_processes


@dataclass
class EncodeArguments:
    """With what images are encoded, and where to."""

    image_tokenizer_name: str | None = field(
        default=None, metadata={"help": "Frozen AutoencoderKL or VQModel, a folder or a Hub id; none: pixels."}
    )
    image_size: int = field(default=256, metadata={"help": "Pixels of a side; pictures are cropped and resized."})
    patch_size: int = field(default=1, metadata={"help": "Latent pixels per side of a patch of the model to be."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Text tokenizer of the model to be: counts max_caption_tokens, and drops what spells its tokens."
        },
    )
    output_dir: str = field(default="runs/encoded", metadata={"help": "Folder for the encoded rows."})
    batch_size: int = field(default=32, metadata={"help": "Images encoded at once."})
    num_shards: int = field(
        default=64, metadata={"help": "Files to write, at most one a row; one is the least redone."}
    )
    num_scale_images: int = field(
        default=512, metadata={"help": "Pictures to measure the latent scale on where the tokenizer has none."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of embedded scenes; that of the training run."})


class LatentEncoder:
    """Turns pixels into mean and standard deviation of scaled latents, as the model will see them.

    Args:
        vae (`AutoencoderKL`): Frozen, with its scaling factor.
        device (`torch.device`): Where to encode; in bfloat16 on a GPU.
    """

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        self.vae, self.device = vae.to(device).eval(), device
        self.shift, self.scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodes uint8 pictures (B, 3, H, W) to float16 arrays (B, c, h, w)."""
        images = pixels.to(self.device, torch.float32) / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            posterior = self.vae.encode(images).latent_dist
        mean, std = (posterior.mean.float() - self.shift) * self.scale, posterior.std.float() * self.scale
        return {"latent_mean": mean.half(), "latent_std": std.half()}


class CodeEncoder:
    """Turns pixels into codes, row by row of their grid.

    In full precision also on a GPU, so that a code does not depend on the device but where two are equally near.

    Args:
        vq (`VQModel`): Frozen.
        device (`torch.device`): Where to encode.
    """

    def __init__(self, vq: VQModel, device: torch.device) -> None:
        self.vq, self.device = vq.to(device).eval(), device

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodes uint8 pictures (B, 3, H, W) to int32 arrays (B, h * w)."""
        images = pixels.to(self.device, torch.float32) / 127.5 - 1
        with full_precision(self.vq):
            latents = self.vq.encode(images.to(self.vq.dtype)).latents.float()
        return {"codes": find_codes(self.vq, latents).flatten(1).int()}


def load_vae(arguments: EncodeArguments, rows: Dataset, state: PartialState) -> tuple[AutoencoderKL, str]:
    """Loads an autoencoder; where it has no latent scale, measures it and keeps a copy with it beside the rows."""
    name = str(arguments.image_tokenizer_name)
    copy = Path(arguments.output_dir) / "image_tokenizer"
    if AutoencoderKL.load_config(name).get("scaling_factor") is not None:
        return AutoencoderKL.from_pretrained(name, use_safetensors=True), name
    with state.main_process_first():
        if not copy.exists():
            vae = AutoencoderKL.from_pretrained(name, use_safetensors=True).to(state.device).eval()
            numbers = np.linspace(0, len(rows) - 1, min(arguments.num_scale_images, len(rows))).astype(int).tolist()
            pictures = TrainingPictures(rows, arguments.image_size, find_latent_shape(vae, arguments.image_size), 0)
            with torch.inference_mode():
                scale = measure_latent_scale(vae, (pictures.pixels(n)[None].to(state.device) for n in numbers))
            vae.register_to_config(scaling_factor=scale)
            draft = copy.with_name(f"{copy.name}.tmp")  # renamed when whole, for a run that is killed meanwhile
            vae.save_pretrained(draft)
            draft.rename(copy)
            print(f"{name} has no `scaling_factor`: measured {scale:.5f} on {len(numbers)} pictures.")
            print(f"Train with --image_tokenizer_name {copy}, the same weights with that scale.")
    return AutoencoderKL.from_pretrained(copy, use_safetensors=True), str(copy)


def choose_encoder(
    arguments: EncodeArguments, rows: Dataset, state: PartialState
) -> tuple[Encoder, int, dict[str, Any]]:
    """Returns the encoder that the recipe names, its stride, and what identifies it."""
    name = arguments.image_tokenizer_name
    if name is None:
        return raw_pixels, 1, {"image_tokenizer_name": None}
    kind = AutoencoderKL.load_config(name)["_class_name"]
    encode: Encoder
    if kind == "VQModel":
        vq = VQModel.from_pretrained(name, use_safetensors=True)
        if arguments.image_size > (vq.config.sample_size or 0) and read_patches(vq) is not None:
            raise ValueError(
                f"`image_size`={arguments.image_size} is more than the {vq.config.sample_size} pixels up to which the "
                f"decoder of `image_tokenizer_name`={name} puts patches together. Make another with "
                "recipes/make_patch_codes.py, or encode smaller pictures."
            )
        tokenizer, encode = vq, CodeEncoder(vq, state.device)
        own = {"num_codes": vq.config.num_vq_embeddings}
        own["code_grid"] = list(find_latent_shape(vq, arguments.image_size)[1:])
    elif kind == "AutoencoderKL":
        vae, name = load_vae(arguments, rows, state)
        tokenizer, encode = vae, LatentEncoder(vae, state.device)
        own = {key: vae.config[key] for key in ("scaling_factor", "shift_factor")}
    else:
        raise ValueError(f"`image_tokenizer_name`={name} is of class {kind}. Name an AutoencoderKL or a VQModel.")
    stride = 2 ** (len(tokenizer.config.block_out_channels) - 1)
    return encode, stride, {"image_tokenizer_name": name, "weights": digest_encoder(tokenizer), **own}


def main(argv: Sequence[str] | None = None) -> Path:
    """Prepares the rows, encodes this process's shards and waits for the others."""
    arguments, data_args, caption_args = parse_recipe(EncodeArguments, DatasetArguments, CaptionArguments, argv=argv)
    output_dir = Path(arguments.output_dir)
    state = start_processes()
    text_tokenizer = None if arguments.tokenizer_name is None else load_text_tokenizer(arguments.tokenizer_name)
    with state.main_process_first():
        rows = open_rows(data_args, image_size=arguments.image_size, seed=arguments.seed)
        rows, report = prepare_rows(rows, data_args, caption_args, text_tokenizer)
    if report is not None and state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "caption_report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
        print(report.to_markdown())
    encode, stride, identity = choose_encoder(arguments, rows, state)
    encode_rows(
        rows,
        encode,
        image_size=arguments.image_size,
        output_dir=output_dir,
        encoder_config=identity,
        batch_size=arguments.batch_size,
        stride=stride * arguments.patch_size,
        num_shards=min(arguments.num_shards, len(rows)),
        process_index=state.process_index,
        num_processes=state.num_processes,
    )
    state.wait_for_everyone()
    end_processes(state)
    return output_dir


if __name__ == "__main__":
    main()
