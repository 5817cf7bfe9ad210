"""Pretrains a model from scratch, or further, on captioned images.

accelerate launch recipes/pretrain.py --config recipes/configs/transfusion_tiny_pretrain.yaml
accelerate launch recipes/pretrain.py --config recipes/configs/transfusion_tiny_pretrain.yaml \
    --dataset_name "my/pictures" --text_column caption --output_dir runs/mine

The same command goes on where a stopped run was. The output folder is then a Hub repo folder.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from accelerate import Accelerator
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.captions import row_weights
from hf_mm.data.collators import TrainingDocuments, build_collator
from hf_mm.data.formats import iterate_captions
from hf_mm.data.mixing import DocumentArguments, SampleKey, StepSampler, document_share
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.data.text_tokenizer import train_text_tokenizer
from hf_mm.hub import export_folder, push_folder
from hf_mm.text_to_image import build_drawing_pipeline
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.held_out import held_out_loss
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import TrainingParts, ema_weights, prepare_training, trainable_parameters
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from hf_mm.training.samples import save_captioned_grid


CARD_TEMPLATE = Path(__file__).parents[1] / "model_cards" / "pretraining.md"


@dataclass
class ModelArguments:
    """What is trained: a checkpoint, or a new model of a configuration file or a preset."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to train further."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a new model, a JSON file."})
    model_type: str = field(default="transfusion", metadata={"help": "Family of a new model made from a preset."})
    preset: str | None = field(default=None, metadata={"help": "Size of a new model, such as 0.16B."})
    config_overrides: str | None = field(default=None, metadata={"help": "Changed fields: patch_size=4,patch_layer=unet"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Text tokenizer; without one it is trained."})
    vocab_size: int = field(default=512, metadata={"help": "Size of a text tokenizer trained here."})
    image_tokenizer_name: str | None = field(default=None, metadata={"help": "Frozen image tokenizer of a new model."})


@dataclass
class PretrainArguments:
    """What pretraining reads and shows beside its pairs."""

    window_length: int | None = field(default=None, metadata={"help": "Pack documents into windows of that length."})
    text_dataset_name: str | None = field(default=None, metadata={"help": "Text-only rows: parquet files or a Hub id."})
    text_dataset_column: str = field(default="text", metadata={"help": "Their column."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out rows; none: the same source."})
    eval_dataset_split: str | None = field(default=None, metadata={"help": "Their split; none: no evaluation."})
    num_eval_documents: int = field(default=256, metadata={"help": "Held-out documents the loss is measured on."})
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts of the sample grids; none: captions of held-out rows."}
    )
    num_samples: int = field(default=16, metadata={"help": "Pictures of a sample grid without prompts of its own."})


def load_tokenizer(model_args: ModelArguments, rows: Dataset, output_dir: Path, accelerator: Accelerator) -> Any:
    """Loads the text tokenizer, training it on the captions first where the recipe names none."""
    name = model_args.tokenizer_name or model_args.model_name_or_path or str(output_dir / "text_tokenizer")
    with accelerator.main_process_first():
        if model_args.tokenizer_name is None and model_args.model_name_or_path is None and not Path(name).exists():
            train_text_tokenizer(iterate_captions(rows), model_args.vocab_size).save_pretrained(name)
    return AutoTokenizer.from_pretrained(name)


def load_config(model_args: ModelArguments) -> Any:
    """Loads or makes the configuration that the recipe names."""
    source = model_args.model_name_or_path or model_args.config_name
    if source is None and model_args.preset is None:
        raise ValueError("Name what to train: `model_name_or_path`, `config_name` or `preset`.")
    if source is not None:
        config = AutoConfig.from_pretrained(source)
    else:
        config = CONFIG_MAPPING[model_args.model_type].from_preset(model_args.preset)
    if model_args.image_tokenizer_name is not None:
        config.set_image_tokenizer(model_args.image_tokenizer_name)
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
    return config


def build_model(model_args: ModelArguments, config: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Loads model and processor, or makes new ones for the tokenizer."""
    if model_args.model_name_or_path is not None:
        model = AutoModelForMultimodalLM.from_pretrained(model_args.model_name_or_path, config=config)
        return model, AutoProcessor.from_pretrained(model_args.model_name_or_path)
    config.set_tokenizer(tokenizer)
    model = AutoModelForMultimodalLM.from_config(config)
    if model_args.image_tokenizer_name is not None:
        model.load_image_tokenizer(model_args.image_tokenizer_name)
    return model, PROCESSOR_MAPPING[type(config)].from_config(config, tokenizer)


def build_batches(
    documents: TrainingDocuments, sampler: StepSampler, collate: Any, num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Reads batches in the sampler's order; workers change nothing but the speed."""
    generator = torch.Generator()  # of its own, so that starting workers draws nothing from the global one
    return iter(
        DataLoader(
            documents, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, generator=generator,
            pin_memory=torch.cuda.is_available(),
        )
    )  # fmt: skip


def mean_length(documents: TrainingDocuments, source: int, num_rows: int) -> float:
    """Mean tokens of a source's documents, over a few hundred."""
    keys = [SampleKey(number, source, number) for number in range(min(num_rows, 300))]
    return sum(len(documents[key]["input_ids"]) for key in keys) / len(keys)


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, showing samples on the way, and exports the finished model."""
    model_args, data_args, caption_args, document_args, pretrain_args, recipe = parse_recipe(
        ModelArguments, DatasetArguments, CaptionArguments, DocumentArguments, PretrainArguments, TrainingRecipe, argv=argv
    )
    started = time.monotonic()
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    config = load_config(model_args)
    with accelerator.main_process_first():
        rows = open_rows(data_args, image_size=config.image_size, seed=recipe.seed)
    tokenizer = load_tokenizer(model_args, rows, output_dir, accelerator)
    model, processor = build_model(model_args, config, tokenizer)
    num_patches = (config.image_size // config.image_stride) ** 2
    room = (pretrain_args.window_length or config.text_config.max_position_embeddings) - num_patches - 4
    caption_args.max_caption_tokens = min(caption_args.max_caption_tokens or room, room)
    with accelerator.main_process_first():
        rows, report = prepare_rows(rows, data_args, caption_args, tokenizer)
    if report is not None and accelerator.is_main_process:
        (output_dir / "captions_report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
        print(report.to_markdown())

    text_rows = None
    if pretrain_args.text_dataset_name is not None:
        text_rows = load_dataset(pretrain_args.text_dataset_name, split="train")
        text_rows = text_rows.select_columns(pretrain_args.text_dataset_column)
        text_rows = text_rows.rename_column(pretrain_args.text_dataset_column, "text")
    latent_side = config.image_size // config.vae_stride
    make_documents = partial(
        TrainingDocuments,
        processor=processor,
        image_size=config.image_size,
        latent_shape=(config.latent_channels, latent_side, latent_side),
        sample_timesteps=model.timestep_sampler(),
        arguments=document_args,
        form_weights=caption_args.form_weights(),
    )
    documents = make_documents(rows, text_rows=text_rows, seed=recipe.seed)
    image_key = "pixel_values" if config.vae_config is not None and "image" in rows.column_names else "latents"
    collate = build_collator(tokenizer.pad_token_id, pretrain_args.window_length, image_key)

    parts = prepare_training(accelerator, model, recipe)
    progress = TrainingProgress()
    identity = asdict(model_args) | asdict(data_args) | asdict(caption_args) | asdict(document_args) | asdict(pretrain_args)
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    first_step = checkpoints.resume()
    share = 0.0
    if text_rows is not None:
        lengths = mean_length(documents, 1, len(text_rows)), mean_length(documents, 0, len(rows))
        share = document_share(document_args.text_token_share, *lengths)
    is_weighted = caption_args.people_oversampling != 1 or caption_args.high_aesthetic_oversampling != 1
    sampler = StepSampler(
        len(rows),
        recipe.per_device_train_batch_size,
        recipe.seed,
        batches_per_step=recipe.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_step=first_step,
        num_text_rows=0 if text_rows is None else len(text_rows),
        text_document_share=share,
        weights=row_weights(rows, caption_args) if is_weighted else None,
        final_step=int(recipe.max_steps * (1 - caption_args.final_share)),
    )
    batches = build_batches(documents, sampler, collate, recipe.dataloader_num_workers)

    held_out = rows
    if pretrain_args.eval_dataset_split is not None:
        eval_args = DatasetArguments(**asdict(data_args) | {"dataset_split": pretrain_args.eval_dataset_split})
        eval_args.dataset_name = pretrain_args.eval_dataset_name or data_args.dataset_name
        eval_args.num_scenes = pretrain_args.num_eval_documents
        with accelerator.main_process_first():
            held_out = open_rows(eval_args, image_size=config.image_size, seed=recipe.seed)
            held_out, _ = prepare_rows(held_out, eval_args, caption_args, tokenizer)
    samples = Samples(accelerator, parts, processor, pretrain_args, output_dir, held_out)

    def evaluate(step: int) -> None:
        """Logs the loss on held-out rows, with the averaged weights."""
        size = recipe.per_device_train_batch_size
        keys = [SampleKey(number, 0, number) for number in range(min(pretrain_args.num_eval_documents, len(held_out)))]
        fixed = make_documents(held_out, seed=recipe.seed + 1)
        batches = (collate([fixed[key] for key in keys[start : start + size]]) for start in range(0, len(keys), size))
        with ema_weights(parts.ema, trainable_parameters(parts.model)):
            plain = accelerator.unwrap_model(parts.model)
            names = {"text_loss": "num_items_in_batch", "image_loss": "num_images_in_batch"}
            losses = held_out_loss(plain, batches, model.count_targets, names, accelerator.device)
        accelerator.log({f"eval/{name}": value for name, value in losses.items()}, step=step)
        accelerator.print(f"step {step}, held-out rows: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))

    every = [(recipe.sample_steps, samples.draw)]
    if pretrain_args.eval_dataset_split is not None:
        every.append((recipe.eval_steps, evaluate))
    train(
        accelerator, parts, batches, recipe,
        count_targets=model.count_targets, save=checkpoints.save, progress=progress, every=every,
    )  # fmt: skip
    if accelerator.is_main_process:
        command = "accelerate launch recipes/pretrain.py " + " ".join(sys.argv[1:] if argv is None else argv)
        minutes = (time.monotonic() - started) / 60
        facts = {"command": command, "minutes": round(minutes, 1), "progress": progress.state_dict(), "num_rows": len(rows)}
        recipes = {"training": asdict(recipe), **identity}
        samples.export(facts, recipes, "" if report is None else report.to_markdown())
        print(f"The finished model is in {output_dir}: {minutes:.1f} minutes, {progress.step} steps.")
        if recipe.push_to_hub is not None:
            print(f"Uploaded: {push_folder(output_dir, recipe.push_to_hub)}")
    accelerator.end_training()
    return output_dir


class Samples:
    """Draws sample grids during a run, and exports the finished model with its card.

    Args:
        accelerator (`Accelerator`): Of the run.
        parts (`TrainingParts`): The model and its averaged weights.
        processor (`ProcessorMixin`): Of the model.
        arguments (`PretrainArguments`): Prompts.
        output_dir (`Path`): Of the run.
        held_out (`Dataset`): Rows whose captions are prompts where none are given.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parts: TrainingParts,
        processor: Any,
        arguments: PretrainArguments,
        output_dir: Path,
        held_out: Dataset,
    ) -> None:
        self.accelerator, self.parts, self.processor, self.output_dir = accelerator, parts, processor, output_dir
        texts = itertools.chain.from_iterable(
            column for name in ("text", "description") if name in held_out.column_names
            for column in [held_out[: arguments.num_samples][name]]
        )  # fmt: skip
        self.prompts = arguments.sample_prompts or list(texts)[: arguments.num_samples]

    def draw(self, step: int) -> None:
        """Saves a grid of samples, drawn with the averaged weights."""
        if not self.accelerator.is_main_process:
            return
        with ema_weights(self.parts.ema, trainable_parameters(self.parts.model)):
            images = self._pipeline()(self.prompts, generator=torch.Generator().manual_seed(0)).images
        path = save_captioned_grid(images, self.prompts, self.output_dir / "samples" / f"step-{step:06d}.png")
        tqdm_safe = f"step {step}: samples in {path}"
        self.accelerator.print(tqdm_safe)

    def _pipeline(self) -> Any:
        """Builds the drawing pipeline around the model as it stands."""
        model = self.accelerator.unwrap_model(self.parts.model).eval()
        pipeline = build_drawing_pipeline(model, self.processor)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def export(self, facts: dict[str, Any], recipes: dict[str, Any], report: str) -> None:
        """Writes the finished model, with the averaged weights, a last grid and the card, into the output folder."""
        with ema_weights(self.parts.ema, trainable_parameters(self.parts.model)):
            pipeline = self._pipeline()
            images = pipeline(self.prompts, generator=torch.Generator().manual_seed(0)).images
            save_captioned_grid(images, self.prompts, self.output_dir / "samples.png")
            values = {"facts": facts, "recipe": json.dumps(recipes, indent=2), "caption_report": report}
            card_data = {"license": "apache-2.0", "tags": ["text-to-image", "image-to-text", "transfusion"]}
            export_folder(
                pipeline, self.output_dir, card_template=CARD_TEMPLATE, card_data=card_data, card_values=values
            )


if __name__ == "__main__":
    main()
