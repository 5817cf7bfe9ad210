"""Trains an image tokenizer on pictures: an `AutoencoderKL`, or a `VQModel` whose latents are codes.

accelerate launch recipes/train_image_tokenizer.py --config recipes/configs/vae_tiny.yaml
accelerate launch recipes/train_image_tokenizer.py --config recipes/configs/vq_tiny.yaml
accelerate launch recipes/train_image_tokenizer.py --config recipes/configs/vae_tiny.yaml \
    --dataset_name my/pictures --output_dir runs/my_vae

Pictures need no captions. The same command goes on where a stopped run was. The output folder is then a Hub repo
folder, with the measured latent scale in its config or the usage of the codes beside it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch.utils.data import DataLoader

from hf_mm.cards import write_card
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.mixing import StepSampler
from hf_mm.data.pictures import TrainingPictures
from hf_mm.data.sources import DatasetArguments, open_pictures, prepare_rows
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.codebook import CodebookUpkeep, save_usage
from hf_mm.training.history import draw_loss_curves, read_history
from hf_mm.training.image_tokenizer import LOSS_PARTS, ImageTokenizerTrainer
from hf_mm.training.image_tokenizer_arguments import (
    ImageTokenizerArguments,
    add_adversary,
    build_image_tokenizer,
    build_trainer,
    find_latent_shape,
)
from hf_mm.training.image_tokenizer_codecs import VQCodec, measure_latent_scale, save_reconstructions
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import TrainingParts, ema_weights, prepare_training, trainable_parameters
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from pushing import HubPush
from reporting import CARDS, card_values, describe_origin, describe_run, finish_run


def build_upkeep(
    arguments: ImageTokenizerArguments,
    trainer: ImageTokenizerTrainer,
    parts: TrainingParts,
    pictures: TrainingPictures,
    progress: TrainingProgress,
    seed: int,
) -> tuple[int | None, Callable[[int], None]]:
    """Returns how often the codebook of a `VQModel` is looked after, and by what; one that stays as it is never."""
    if not isinstance(trainer.codec, VQCodec) or arguments.trains_decoder_only:
        return None, lambda step: None
    upkeep = CodebookUpkeep(
        trainer.codec,
        parts.ema,
        trainable_parameters(parts.model),
        lambda generator: pictures.draw(arguments.num_revival_images, generator),
        progress,
        seed=seed,
        first_quantized_step=arguments.quantization_start_step,
        last_revival_step=arguments.last_code_revival_step,
    )
    return arguments.code_revival_steps, upkeep


def export(
    tokenizer: AutoencoderKL | VQModel,
    parts: TrainingParts,
    pictures: TrainingPictures,
    num_pictures: int,
    folder: Path,
    describe: Callable[[Path, str], object],
) -> str:
    """Measures the latent scale or the usage of the codes, and saves the tokenizer as it stands; for the main process.

    Args:
        tokenizer (`AutoencoderKL` or `VQModel`): That was trained.
        parts ([`TrainingParts`]): With the averaged weights.
        pictures ([`TrainingPictures`]): To measure on.
        num_pictures (`int`): How many of them.
        folder (`Path`): Where to.
        describe (`Callable[[Path, str], object]`): Writes the card into the folder, with what was measured.

    Returns:
        `str`: where it is, and what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keeps_latents = not any(weight.requires_grad for weight in tokenizer.encoder.parameters())  # and their scale
    with ema_weights(parts.ema, trainable_parameters(parts.model)):
        images = (pictures.pixels(number)[None].to(tokenizer.device) for number in range(num_pictures))
        if isinstance(tokenizer.eval(), VQModel):
            measured = save_usage(tokenizer, images, num_pictures, folder)
        elif keeps_latents:
            measured = f"nothing; its latent scale stays {tokenizer.config.scaling_factor:.4f}"
        else:
            scale = measure_latent_scale(tokenizer, images)
            tokenizer.register_to_config(scaling_factor=scale)
            measured = f"latent scale {scale:.4f}"
        save_reconstructions(tokenizer, pictures.first(8), folder / "reconstructions.png")
        tokenizer.save_pretrained(folder)
    describe(folder, f"Measured on {num_pictures} training pictures: {measured}.")
    return f"The tokenizer is in {folder}, with {measured}."


def describe_tokenizer(
    folder: Path,
    measured: str,
    *,
    tokenizer: AutoencoderKL | VQModel,
    find_facts: Callable[[], Mapping[str, Any]],
    recipe: Mapping[str, Any],
    data_report: str,
) -> None:
    """Draws the losses so far and writes the card of a tokenizer; see `card_values` of reporting."""
    draw_loss_curves(read_history(Path(recipe["output_dir"]) / "history.jsonl"), folder / "loss_curves.png")
    facts = find_facts()
    values = card_values(folder, tokenizer, facts, recipe, data_report)
    data = {"library_name": "diffusers", "pipeline_tag": "image-to-image", **describe_origin(recipe)}
    write_card(
        folder, CARDS / "image_tokenizer.md", data, {**values, "kind": type(tokenizer).__name__, "measured": measured}
    )


def read_recipe(
    argv: Sequence[str] | None,
) -> tuple[ImageTokenizerArguments, DatasetArguments, CaptionArguments, TrainingRecipe]:
    """Parses the fields, and refuses those that do not fit each other."""
    arguments, data_args, caption_args, recipe = parse_recipe(
        ImageTokenizerArguments, DatasetArguments, CaptionArguments, TrainingRecipe, argv=argv
    )
    if (start := arguments.quantization_start_step) > recipe.max_steps:
        raise ValueError(
            f"`quantization_start_step`={start} is beyond `max_steps`={recipe.max_steps}, so there would be no codes. "
            "Give a smaller one."
        )
    return arguments, data_args, caption_args, recipe


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, measures the latent scale or the usage of the codes, and saves the tokenizer."""
    argv = sys.argv[1:] if argv is None else argv
    arguments, data_args, caption_args, recipe = read_recipe(argv)
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    push = HubPush(accelerator, recipe)
    tokenizer = build_image_tokenizer(arguments)
    latent_shape = find_latent_shape(tokenizer, arguments.image_size)
    with accelerator.main_process_first():
        rows = open_pictures(data_args, image_size=arguments.image_size, seed=recipe.seed)
        rows, report = prepare_rows(rows, data_args, caption_args, None)
    if report is not None:
        accelerator.print(report.to_markdown())
    noise_shape = None if isinstance(tokenizer, VQModel) else latent_shape
    pictures = TrainingPictures(rows, arguments.image_size, noise_shape, recipe.seed)

    trainer = build_trainer(arguments, tokenizer)
    parts = prepare_training(accelerator, trainer, recipe)
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
    workers = recipe.dataloader_num_workers
    loader = DataLoader(pictures, batch_sampler=sampler, num_workers=workers, generator=torch.Generator())

    def draw(step: int) -> None:
        if accelerator.is_main_process:
            with ema_weights(parts.ema, trainable_parameters(parts.model)):
                save_reconstructions(tokenizer, pictures.first(8), output_dir / "samples" / f"step-{step:06d}.png")

    facts = partial(describe_run, "train_image_tokenizer.py", argv, accelerator, recipe, len(rows), progress)
    told = {"recipe": asdict(recipe) | identity, "data_report": "" if report is None else report.to_markdown()}
    describe = partial(describe_tokenizer, tokenizer=tokenizer, find_facts=facts, **told)
    num_pictures = min(arguments.num_scale_images, len(rows))
    save = partial(export, tokenizer, parts, pictures, num_pictures, describe=describe)
    push_every = push.every(lambda folder: save(folder) if accelerator.is_main_process else None)
    revival_steps, upkeep = build_upkeep(arguments, trainer, parts, pictures, progress, recipe.seed)
    if first_step == 0 and arguments.model_name_or_path is None:  # a trained codebook stays
        upkeep(0)
    train(
        accelerator,
        parts,
        add_adversary(iter(loader), arguments, first_step, batches_per_step),
        recipe,
        count_targets=ImageTokenizerTrainer.count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[(revival_steps, upkeep), (recipe.sample_steps, draw), push_every],
        loss_parts=LOSS_PARTS,
    )
    finish_run(accelerator, push, lambda: save(output_dir))
    return output_dir


if __name__ == "__main__":
    main()
