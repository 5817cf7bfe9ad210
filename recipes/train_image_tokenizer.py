"""Trains an image tokenizer, an `AutoencoderKL`, on pictures.

accelerate launch recipes/train_image_tokenizer.py --config recipes/configs/vae_tiny.yaml
accelerate launch recipes/train_image_tokenizer.py --config recipes/configs/vae_tiny.yaml \
    --dataset_name my/pictures --text_column caption --output_dir runs/my_vae

The same command goes on where a stopped run was. The output folder is then a Hub repo folder with the measured
latent scale in its config.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch.utils.data import DataLoader

from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.formats import center_crop_resize, open_image
from hf_mm.data.mixing import SampleKey, StepSampler
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.image_tokenizer import (
    LOSS_PARTS,
    ImageTokenizerTrainer,
    ImageTokenizerWeights,
    KLCodec,
    PatchDiscriminator,
    load_feature_distance,
    measure_latent_scale,
)
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import ema_weights, prepare_training, trainable_parameters
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from hf_mm.training.samples import save_captioned_grid


@dataclass
class ImageTokenizerArguments:
    """The tokenizer, and what its loss is made of."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "AutoencoderKL to train further."})
    image_size: int = field(default=64, metadata={"help": "Pixels of a side; pictures are cropped and resized."})
    latent_channels: int = field(default=4, metadata={"help": "Channels of the latent."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 64],
        metadata={"help": "Channels per level; each level but one halves the size."},
    )
    layers_per_block: int = field(default=1, metadata={"help": "Residual blocks per level."})
    norm_num_groups: int = field(default=8, metadata={"help": "Groups of the norms; divides every level's channels."})
    latent_weight: float = field(default=1e-6, metadata={"help": "Weight of the KL, summed over the latent."})
    adversarial_weight: float = field(default=0.5, metadata={"help": "Weight of the generator's loss."})
    discriminator_start_step: int | None = field(default=None, metadata={"help": "First step with it; none: never."})
    discriminator_channels: int = field(default=64, metadata={"help": "Width of the discriminator's first layer."})
    discriminator_layers: int = field(default=3, metadata={"help": "Its layers with stride 2."})
    perceptual_model: str | None = field(default=None, metadata={"help": "Backbone of transformers for LPIPS."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of that distance."})
    identity_model: str | None = field(default=None, metadata={"help": "Backbone of transformers for the ID loss."})
    identity_weight: float = field(default=0.2, metadata={"help": "Weight of that distance."})
    num_scale_images: int = field(default=512, metadata={"help": "Pictures the latent scale is measured on."})

    def __post_init__(self) -> None:
        """Refuses sizes that do not fit together."""
        stride = 2 ** (len(self.block_out_channels) - 1)
        if self.image_size % stride:
            raise ValueError(
                f"`image_size`={self.image_size} must be a multiple of {stride}, the stride of "
                f"{len(self.block_out_channels)} `block_out_channels`. Try {self.image_size // stride * stride}."
            )
        if bad := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            raise ValueError(f"`norm_num_groups`={self.norm_num_groups} does not divide `block_out_channels` {bad}.")


class Pictures(torch.utils.data.Dataset):
    """Pictures as tensors in [-1, 1], each with noise of its own for the posterior."""

    def __init__(self, rows: Dataset, image_size: int, latent_shape: tuple[int, int, int], seed: int) -> None:
        self.rows, self.image_size, self.latent_shape, self.seed = rows, image_size, latent_shape, seed
        self.processor = VaeImageProcessor(do_resize=False)

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 2**40 + key.number)
        noise = torch.randn(self.latent_shape, generator=generator)
        return {"pixel_values": self.pixels(key.row), "latent_noise": noise}

    def pixels(self, number: int) -> torch.Tensor:
        """Reads one picture, (3, H, W)."""
        image = center_crop_resize(open_image(self.rows[number]["image"]), self.image_size)
        return self.processor.preprocess(image)[0]


def build_vae(arguments: ImageTokenizerArguments) -> AutoencoderKL:
    """Loads or makes the tokenizer; another kind of tokenizer is one more branch here, with a codec of its own."""
    if arguments.model_name_or_path is not None:
        return AutoencoderKL.from_pretrained(arguments.model_name_or_path, use_safetensors=True)
    num_levels = len(arguments.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=tuple(arguments.block_out_channels),
        layers_per_block=arguments.layers_per_block,
        latent_channels=arguments.latent_channels,
        norm_num_groups=arguments.norm_num_groups,
        sample_size=arguments.image_size,
    )


def build_trainer(arguments: ImageTokenizerArguments, vae: AutoencoderKL) -> ImageTokenizerTrainer:
    """Joins the tokenizer with its discriminator and the feature networks that the recipe names."""
    names = {"perceptual_distance": arguments.perceptual_model, "identity_distance": arguments.identity_model}
    return ImageTokenizerTrainer(
        KLCodec(vae),
        PatchDiscriminator(arguments.discriminator_channels, arguments.discriminator_layers),
        ImageTokenizerWeights(arguments.latent_weight, arguments.perceptual_weight, arguments.identity_weight),
        **{key: None if name is None else load_feature_distance(name) for key, name in names.items()},
    )


def add_adversary(batches: Iterator[Any], sampler: StepSampler, arguments: ImageTokenizerArguments) -> Iterator[Any]:
    """Puts the generator's weight into the batches from its first step on."""
    start = arguments.discriminator_start_step
    for number, batch in enumerate(batches, start=sampler.first_step * sampler.batches_per_step):
        if start is not None and number // sampler.batches_per_step + 1 >= start:
            batch["adversarial_weight"] = torch.tensor(arguments.adversarial_weight)
        yield batch


@torch.no_grad()
def save_reconstructions(vae: AutoencoderKL, pictures: Pictures, path: Path) -> None:
    """Saves eight pictures, each beside what the tokenizer makes of it."""
    pixels = torch.stack([pictures.pixels(number) for number in range(min(8, len(pictures.rows)))]).to(vae.device)
    ours = vae.eval().decode(vae.encode(pixels).latent_dist.mode()).sample
    pairs = torch.stack([pixels, ours], dim=1).flatten(0, 1).cpu()  # (2 N, 3, H, W), by turns
    save_captioned_grid(pictures.processor.postprocess(pairs), ["picture", "decoded"] * len(pixels), path)


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, measures the latent scale and saves the tokenizer."""
    arguments, data_args, caption_args, recipe = parse_recipe(
        ImageTokenizerArguments, DatasetArguments, CaptionArguments, TrainingRecipe, argv=argv
    )
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    with accelerator.main_process_first():
        rows = open_rows(data_args, image_size=arguments.image_size, seed=recipe.seed)
        rows, report = prepare_rows(rows, data_args, caption_args, None)
    if report is not None:
        accelerator.print(report.to_markdown())
    vae = build_vae(arguments)
    side = arguments.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = Pictures(rows, arguments.image_size, (vae.config.latent_channels, side, side), recipe.seed)

    parts = prepare_training(accelerator, build_trainer(arguments, vae), recipe)
    progress = TrainingProgress()
    identity = asdict(arguments) | asdict(data_args) | asdict(caption_args)
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    sampler = StepSampler(
        len(rows),
        recipe.per_device_train_batch_size,
        recipe.seed,
        batches_per_step=recipe.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_step=checkpoints.resume(),
    )
    loader = DataLoader(
        pictures, batch_sampler=sampler, num_workers=recipe.dataloader_num_workers, generator=torch.Generator()
    )

    def draw(step: int) -> None:
        if accelerator.is_main_process:
            with ema_weights(parts.ema, trainable_parameters(parts.model)):
                save_reconstructions(vae, pictures, output_dir / "samples" / f"step-{step:06d}.png")

    train(
        accelerator,
        parts,
        add_adversary(iter(loader), sampler, arguments),
        recipe,
        count_targets=ImageTokenizerTrainer.count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[(recipe.sample_steps, draw)],
        loss_parts=LOSS_PARTS,
    )
    if accelerator.is_main_process:
        with ema_weights(parts.ema, trainable_parameters(parts.model)):
            numbers = range(min(arguments.num_scale_images, len(rows)))
            scale = measure_latent_scale(vae.eval(), (pictures.pixels(n)[None].to(vae.device) for n in numbers))
            vae.register_to_config(scaling_factor=scale)
            save_reconstructions(vae, pictures, output_dir / "reconstructions.png")
            vae.save_pretrained(output_dir)
            if recipe.push_to_hub is not None:
                vae.push_to_hub(recipe.push_to_hub)
        accelerator.print(f"The tokenizer is in {output_dir}, with latent scale {scale:.4f}.")
    accelerator.end_training()
    return output_dir


if __name__ == "__main__":
    main()
