"""Times the encoding of pictures for training against the image tokenizer's bare forward.

python benchmarks/image_encoding.py --output image_encoding.json

Whole: PNG files opened, checked, cropped, resized and encoded as `recipes/encode_images.py` does, and written as
Arrow shards. Bare: the same batches, ready in memory, through the tokenizer alone, for an `AutoencoderKL` and for a
`VQModel` with its search of the nearest of 8,192 codes. What is left between them is measured by itself, with an
encoder that only takes pixels on, and so is the encoder of the `VQModel` without that search.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderKL, VQModel
from PIL import Image as PILImage

from hf_mm.data.formats import center_crop_resize
from hf_mm.data.image_encoding import Encoder, encode_rows, raw_pixels
from timing import Clock, benchmark_parser, count_parameters, describe, profile, take_turns, tell


sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from encode_images import CodeEncoder, LatentEncoder  # noqa: E402


SIZES = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 8,
}
SCALE = 1.25  # pictures are that much larger than what is encoded of them, and half as wide again as high


def make_rows(num_images: int, image_size: int) -> Dataset:
    """Makes PNG files of smooth noise in memory."""
    generator = torch.Generator().manual_seed(0)
    height = round(SCALE * image_size)
    files = []
    for _ in range(num_images):
        noise = (255 * torch.rand(8, 12, 3, generator=generator)).byte().numpy()
        file = io.BytesIO()
        PILImage.fromarray(noise).resize((height * 3 // 2, height), PILImage.Resampling.BICUBIC).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(decode=False), "text": Value("string")})
    return Dataset.from_dict({"image": files, "text": ["a picture"] * num_images}, features=features)


def encode_whole(rows: Dataset, encode: Encoder, arguments: argparse.Namespace, folder: Path) -> None:
    """Encodes rows as the recipe does, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        encode_rows(
            rows,
            encode,
            image_size=arguments.image_size,
            output_dir=folder,
            encoder_config={},
            batch_size=arguments.batch_size,
        )


@torch.inference_mode()
def encode_bare(encode: Callable[[torch.Tensor], object], batches: list[torch.Tensor]) -> None:
    """Runs over batches, and drops what they give."""
    for batch in batches:
        encode(batch)


def read_batches(rows: Dataset, arguments: argparse.Namespace) -> list[torch.Tensor]:
    """Prepares the same batches in memory."""
    size = (arguments.image_size, arguments.image_size)
    pictures = [
        torch.tensor(list(center_crop_resize(PILImage.open(io.BytesIO(row["image"]["bytes"])), size).tobytes()))
        for row in rows
    ]
    pixels = torch.stack(pictures).view(-1, *size, 3).permute(0, 3, 1, 2) / 127.5 - 1
    return list(pixels.contiguous().split(arguments.batch_size))


def summarise(clock: Clock, num_images: int) -> dict[str, Any]:
    """Gives pictures a second, and how much longer the whole takes."""
    return {
        "images_per_second": {name: round(num_images / clock.median(name), 1) for name in clock},
        "whole_over_bare": {name: clock.ratio(f"{name}_whole", f"{name}_bare") for name in ("vae", "vq")},
        "share_of_reading_and_writing": {
            name: round(clock.median("pixels_whole") / clock.median(f"{name}_whole"), 3) for name in ("vae", "vq")
        },
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both encoders, both ways, in turn, and returns what was found, and on what."""
    result = describe(arguments, (torch, diffusers, datasets))
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    datasets.disable_progress_bars()
    rows = make_rows(arguments.num_images, arguments.image_size)
    batches = read_batches(rows, arguments)
    vae = AutoencoderKL(**SIZES, scaling_factor=0.7, sample_size=arguments.image_size).eval()
    vq = VQModel(**SIZES, num_vq_embeddings=8192, sample_size=arguments.image_size).eval()
    device = torch.device("cpu")
    encoders: dict[str, Encoder] = {
        "vae": LatentEncoder(vae, device),
        "vq": CodeEncoder(vq, device),
        "pixels": raw_pixels,
    }
    with tempfile.TemporaryDirectory() as temporary:
        deeds: dict[str, Callable[[], object]] = {
            f"{name}_whole": partial(encode_whole, rows, encode, arguments, Path(temporary) / name)
            for name, encode in encoders.items()
        }
        deeds["vae_bare"] = partial(encode_bare, vae.encode, batches)
        deeds["vq_bare"] = partial(encode_bare, lambda batch: vq.quantize(vq.encode(batch).latents), batches)
        deeds["vq_bare_encoder"] = partial(encode_bare, vq.encode, batches)
        clocks = take_turns(deeds, arguments.num_repeats)
        if arguments.profile:
            result["profile"] = profile(deeds["vq_whole"])
    result["encoder_parameters"] = {"vae": count_parameters(vae.encoder), "vq": count_parameters(vq.encoder)}
    return result | {name: summarise(clock, arguments.num_images) for name, clock in clocks.items()}


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_repeats=5)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="Shows where the time goes, for the VQModel.")
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
