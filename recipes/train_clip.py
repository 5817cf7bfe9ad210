"""Trains a small CLIP on captioned pictures: transformers' own `CLIPModel`, for re-ranking and retrieval.

accelerate launch recipes/train_clip.py --config recipes/configs/clip_tiny.yaml
accelerate launch recipes/train_clip.py --config recipes/configs/clip_tiny.yaml \
    --dataset_name "my/pictures" --text_column caption --output_dir runs/my_clip

The same command goes on where a stopped run was. The output folder is then an ordinary repo of transformers, which
`CLIPModel`, `CLIPProcessor` and `pipeline("zero-shot-image-classification")` load, with `retrieval.json` beside it.
To draw eight candidates and keep the one it likes best:

    clip = {"reranker": CLIPModel.from_pretrained(folder), "reranker_processor": CLIPProcessor.from_pretrained(folder)}
    DiffusionPipeline.from_pretrained("runs/cm3leon_tiny", **clip)("a red star", num_candidates=8)
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from building import HeldOutArguments, ModelArguments, find_text_tokenizer, hold_out
from clip_report import ClipReport
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.captioned_pictures import CaptionedPictures, PairCollator
from hf_mm.data.captions import row_weights
from hf_mm.data.image_encoding import read_manifest
from hf_mm.data.mixing import StepSampler
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.data.text_tokenizer import end_captions
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.contrastive import LOSS_PARTS, ContrastiveTrainer
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import prepare_training
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from pushing import HubPush
from reporting import describe_run, finish_run


@dataclass
class ClipArguments(HeldOutArguments):
    """What is trained: a checkpoint, or a new model of a configuration file."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "CLIP to train further."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a new CLIP, a JSON file."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Text tokenizer of a new CLIP; none: trained on the captions."}
    )
    vocab_size: int = field(default=512, metadata={"help": "Size of a text tokenizer trained here."})


ARGUMENTS = (ClipArguments, DatasetArguments, CaptionArguments, TrainingRecipe)


def load_clip_config(arguments: ClipArguments) -> CLIPConfig:
    """Loads the configuration that a recipe names.

    Raises:
        ValueError: If it is of another model, or its patches do not cover the picture.
    """
    field_name = "model_name_or_path" if arguments.model_name_or_path is not None else "config_name"
    source = arguments.model_name_or_path or arguments.config_name
    if source is None:
        raise ValueError("Name what to train: `model_name_or_path` or `config_name`.")
    kind = CLIPConfig.get_config_dict(source)[0].get("model_type")
    if kind != "clip":
        raise ValueError(f"`{field_name}`={source!r} is of model type {kind!r}. Name a CLIP: model type 'clip'.")
    config = CLIPConfig.from_pretrained(source)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    if side % patch:
        raise ValueError(
            f"`{field_name}`={source!r}: `image_size`={side} must be a multiple of `patch_size`={patch}; the pixels "
            f"that are left over would not be seen. Try {side // patch * patch}."
        )
    return config


def refuse_unfit_rows(rows: Dataset, name: str) -> None:
    """Refuses rows that are no pairs of a picture and a caption."""
    if "image" not in rows.column_names:
        raise ValueError(
            f"`dataset_name`={name!r} has no column `image`: a CLIP is trained on pairs of a picture and a caption. "
            f"Columns here: {rows.column_names}."
        )


def open_pairs(data_args: DatasetArguments, image_size: int, seed: int) -> Dataset:
    """Opens pairs, refusing what a CLIP cannot be trained on."""
    if read_manifest(data_args.dataset_name) is not None:
        raise ValueError(
            f"`dataset_name`={data_args.dataset_name!r} holds encoded images. Name the source of the pictures "
            "themselves."
        )
    rows = open_rows(data_args, image_size=image_size, seed=seed)
    refuse_unfit_rows(rows, data_args.dataset_name)
    return rows


def build_clip(
    arguments: ClipArguments, config: CLIPConfig, rows: Dataset, output_dir: Path, accelerator: Accelerator
) -> tuple[CLIPModel, CLIPProcessor]:
    """Loads model and processor, or makes new ones with a tokenizer that ends captions as the model needs it.

    Raises:
        ValueError: If the processor of a checkpoint makes pictures of another size than the model reads.
    """
    side = config.vision_config.image_size
    if arguments.model_name_or_path is not None:
        processor = CLIPProcessor.from_pretrained(arguments.model_name_or_path)
        made = processor.image_processor.crop_size
        if (made["height"], made["width"]) != (side, side):
            raise ValueError(
                f"`model_name_or_path`={arguments.model_name_or_path!r}: its processor makes pictures of "
                f"{made['height']} x {made['width']} px, and its model reads {side} x {side} px. Set `crop_size` and "
                "`size` of the processor to the model's `image_size`."
            )
        return CLIPModel.from_pretrained(arguments.model_name_or_path), processor
    source = ModelArguments(tokenizer_name=arguments.tokenizer_name, vocab_size=arguments.vocab_size)
    tokenizer = find_text_tokenizer(source, rows, output_dir, accelerator)
    tokenizer = end_captions(tokenizer, config.text_config.max_position_embeddings)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    config.text_config.vocab_size = len(tokenizer)
    # The shorter side first, then the middle: the framing of the other recipes.
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPModel(config), CLIPProcessor(image_processor, tokenizer)


def build_batches(
    pairs: CaptionedPictures,
    collate: PairCollator,
    caption_args: CaptionArguments,
    recipe: TrainingRecipe,
    accelerator: Accelerator,
    first_step: int,
) -> DataLoader:
    """Builds the endless batches of this process, from the step after `first_step` on.

    Raises:
        ValueError: If a batch holds nothing to compare a pair with.
    """
    if recipe.per_device_train_batch_size * accelerator.num_processes < 2:
        raise ValueError(
            f"`per_device_train_batch_size`={recipe.per_device_train_batch_size} leaves nothing to compare a pair "
            "with. Use at least 2; hundreds are better."
        )
    sampler = StepSampler(
        len(pairs.rows),
        recipe.per_device_train_batch_size,
        recipe.seed,
        batches_per_step=recipe.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_step=first_step,
        weights=row_weights(pairs.rows, caption_args) if caption_args.is_weighted else None,
        final_step=int(recipe.max_steps * (1 - caption_args.final_share)),
    )
    return DataLoader(
        pairs,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=recipe.dataloader_num_workers,
        generator=torch.Generator(),  # of its own, so that starting workers draws nothing from the global one
        pin_memory=torch.cuda.is_available(),
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, measures recall on the way, and saves model and processor."""
    argv = sys.argv[1:] if argv is None else argv
    clip_args, data_args, caption_args, recipe = parse_recipe(*ARGUMENTS, argv=argv)
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    push = HubPush(accelerator, recipe)
    config = load_clip_config(clip_args)
    side = config.vision_config.image_size
    with accelerator.main_process_first():
        rows = open_pairs(data_args, side, recipe.seed)
    model, processor = build_clip(clip_args, config, rows, output_dir, accelerator)

    def prepare(source: DatasetArguments) -> Dataset:
        opened = open_pairs(source, side, recipe.seed)
        return prepare_rows(opened, source, caption_args, processor.tokenizer)[0]

    with accelerator.main_process_first():
        rows, report = prepare_rows(rows, data_args, caption_args, processor.tokenizer)
        rows, held_out = hold_out(rows, data_args, clip_args, prepare, recipe.seed)
    if report is not None:
        accelerator.print(report.to_markdown())

    trainer = ContrastiveTrainer(model)
    parts = prepare_training(accelerator, trainer, recipe)
    progress = TrainingProgress()
    identity: dict[str, Any] = asdict(clip_args) | asdict(data_args) | asdict(caption_args)
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    form_weights = caption_args.form_weights()
    pairs = CaptionedPictures(rows, form_weights, recipe.seed)
    loader = build_batches(pairs, PairCollator(processor), caption_args, recipe, accelerator, checkpoints.resume())
    held_out_pairs = CaptionedPictures(held_out, form_weights, recipe.seed + 1)
    shown = ClipReport(accelerator, parts, model, processor, held_out_pairs, clip_args.num_eval_documents, output_dir)
    told = "" if report is None else report.to_markdown()

    def export(folder: Path) -> str:
        if not accelerator.is_main_process:
            return ""
        facts = describe_run("train_clip.py", argv, accelerator, recipe, len(rows), progress)
        return shown.export(folder, facts, asdict(recipe) | identity, told)

    train(
        accelerator,
        parts,
        iter(loader),
        recipe,
        count_targets=ContrastiveTrainer.count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[
            (recipe.sample_steps, shown.draw),
            (recipe.eval_steps if clip_args.eval_dataset_split else None, shown.evaluate),
            push.every(export),
        ],
        loss_parts=LOSS_PARTS,
    )
    finish_run(accelerator, push, lambda: export(output_dir))
    return output_dir


if __name__ == "__main__":
    main()
