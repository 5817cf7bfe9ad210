"""Trains an image tokenizer, an `AutoencoderKL`, on pictures.

accelerate launch recipes/train_image_tokenizer.py --config recipes/configs/vae_tiny.yaml
accelerate launch recipes/train_image_tokenizer.py --config recipes/configs/vae_tiny.yaml \
    --dataset_name my/pictures --output_dir runs/my_vae

Pictures need no captions. The same command goes on where a stopped run was. The output folder is then a Hub repo
folder with the measured latent scale in its config.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.mixing import StepSampler
from hf_mm.data.pictures import TrainingPictures
from hf_mm.data.sources import DatasetArguments, open_pictures, prepare_rows
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.image_tokenizer import (
    LOSS_PARTS,
    ImageTokenizerTrainer,
    measure_latent_scale,
    save_reconstructions,
)
from hf_mm.training.image_tokenizer_arguments import (
    ImageTokenizerArguments,
    add_adversary,
    build_trainer,
    build_vae,
    find_latent_shape,
)
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import ema_weights, prepare_training, trainable_parameters
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, measures the latent scale and saves the tokenizer."""
    arguments, data_args, caption_args, recipe = parse_recipe(
        ImageTokenizerArguments, DatasetArguments, CaptionArguments, TrainingRecipe, argv=argv
    )
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    vae = build_vae(arguments)
    latent_shape = find_latent_shape(vae, arguments.image_size)
    with accelerator.main_process_first():
        rows = open_pictures(data_args, image_size=arguments.image_size, seed=recipe.seed)
        rows, report = prepare_rows(rows, data_args, caption_args, None)
    if report is not None:
        accelerator.print(report.to_markdown())
    pictures = TrainingPictures(rows, arguments.image_size, latent_shape, recipe.seed)

    parts = prepare_training(accelerator, build_trainer(arguments, vae), recipe)
    progress = TrainingProgress()
    identity = asdict(arguments) | asdict(data_args) | asdict(caption_args)
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    first_step, batches_per_step = checkpoints.resume(), recipe.gradient_accumulation_steps
    sampler = StepSampler(
        len(rows),
        recipe.per_device_train_batch_size,
        recipe.seed,
        batches_per_step=batches_per_step,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_step=first_step,
    )
    loader = DataLoader(
        pictures, batch_sampler=sampler, num_workers=recipe.dataloader_num_workers, generator=torch.Generator()
    )

    def draw(step: int) -> None:
        if accelerator.is_main_process:
            with ema_weights(parts.ema, trainable_parameters(parts.model)):
                save_reconstructions(vae, pictures.first(8), output_dir / "samples" / f"step-{step:06d}.png")

    train(
        accelerator,
        parts,
        add_adversary(iter(loader), arguments, first_step, batches_per_step),
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
            save_reconstructions(vae, pictures.first(8), output_dir / "reconstructions.png")
            vae.save_pretrained(output_dir)
            if recipe.push_to_hub is not None:
                vae.push_to_hub(recipe.push_to_hub)
        accelerator.print(f"The tokenizer is in {output_dir}, with latent scale {scale:.4f}.")
    accelerator.end_training()
    return output_dir


if __name__ == "__main__":
    main()
