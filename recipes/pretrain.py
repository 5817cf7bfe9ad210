"""Pretrains a model from scratch, or further, on captioned images.

accelerate launch recipes/pretrain.py --config recipes/configs/transfusion_tiny_pretrain.yaml
accelerate launch recipes/pretrain.py --config recipes/configs/transfusion_tiny_pretrain.yaml \
    --dataset_name "my/pictures" --text_column caption --output_dir runs/mine

The same command goes on where a stopped run was. The output folder is then a Hub repo folder.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from building import DocumentBatches, ModelArguments, build_model, find_text_tokenizer, load_config
from datasets import Dataset, load_dataset
from reporting import RunReport, first_captions

from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.captions import row_weights
from hf_mm.data.mixing import DocumentArguments, StepSampler, document_share
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.hub import push_folder
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import prepare_training
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe


@dataclass
class PretrainArguments:
    """What pretraining reads and shows beside its pairs."""

    window_length: int | None = field(default=None, metadata={"help": "Pack documents into windows of that length."})
    text_dataset_name: str | None = field(default=None, metadata={"help": "Text-only rows: a Hub id or a folder."})
    text_dataset_config_name: str | None = field(default=None, metadata={"help": "Their configuration."})
    text_dataset_column: str = field(default="text", metadata={"help": "Their column."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out rows; none: the same source."})
    eval_dataset_split: str | None = field(default=None, metadata={"help": "Their split; none: no evaluation."})
    num_eval_documents: int = field(default=256, metadata={"help": "Held-out documents the loss is measured on."})
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Of the grids; none: held-out captions."}
    )
    num_samples: int = field(default=16, metadata={"help": "Pictures of a grid without prompts of its own."})


def load_text_rows(arguments: PretrainArguments) -> Dataset | None:
    """Loads the text-only rows, if the recipe names any."""
    if arguments.text_dataset_name is None:
        return None
    rows = load_dataset(arguments.text_dataset_name, arguments.text_dataset_config_name, split="train")
    rows = rows.select_columns(arguments.text_dataset_column)
    return (
        rows if arguments.text_dataset_column == "text" else rows.rename_column(arguments.text_dataset_column, "text")
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, shows samples on the way, and exports the finished model."""
    model_args, data_args, caption_args, document_args, extra, recipe = parse_recipe(
        ModelArguments,
        DatasetArguments,
        CaptionArguments,
        DocumentArguments,
        PretrainArguments,
        TrainingRecipe,
        argv=argv,
    )
    identity = {
        name: value
        for part in (model_args, data_args, caption_args, document_args, extra)
        for name, value in asdict(part).items()
    }
    started = time.monotonic()
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    config = load_config(model_args)
    size = {"image_size": config.image_size, "seed": recipe.seed}
    with accelerator.main_process_first():
        rows = open_rows(data_args, **size)
    tokenizer = find_text_tokenizer(model_args, rows, output_dir, accelerator)
    model, processor = build_model(model_args, config, tokenizer)

    room = (extra.window_length or config.text_config.max_position_embeddings) - processor.tokens_per_image() - 2
    caption_args.max_caption_tokens = min(caption_args.max_caption_tokens or room, room)
    eval_args = replace(
        data_args,
        dataset_name=extra.eval_dataset_name or data_args.dataset_name,
        dataset_split=extra.eval_dataset_split or data_args.dataset_split,
        num_scenes=extra.num_eval_documents,
    )
    with accelerator.main_process_first():
        rows, report = prepare_rows(rows, data_args, caption_args, tokenizer)
        held_out, _ = prepare_rows(open_rows(eval_args, **size), eval_args, caption_args, tokenizer)
    if report is not None and accelerator.is_main_process:
        (output_dir / "caption_report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
        print(report.to_markdown())
    text_rows = load_text_rows(extra)

    parts = prepare_training(accelerator, model, recipe)
    progress = TrainingProgress()
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    first_step = checkpoints.resume()
    documents = DocumentBatches(model, processor, document_args, caption_args.form_weights(), extra.window_length)
    share = 0.0
    if text_rows is not None:
        lengths = (documents.mean_tokens(rows, text_rows, source) for source in (1, 0))
        share = document_share(document_args.text_token_share, *lengths)
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
        weights=row_weights(rows, caption_args) if caption_args.is_weighted else None,
        final_step=int(recipe.max_steps * (1 - caption_args.final_share)),
    )
    batches = documents.endless(rows, text_rows, sampler, recipe.seed, recipe.dataloader_num_workers)

    shown = RunReport(
        accelerator, parts, processor, extra.sample_prompts or first_captions(held_out, extra.num_samples), output_dir
    )
    held_out_batches = (held_out, extra.num_eval_documents, recipe.per_device_train_batch_size, recipe.seed + 1)
    evaluate = shown.evaluation(lambda: documents.fixed(*held_out_batches), model.count_targets)
    train(
        accelerator,
        parts,
        batches,
        recipe,
        count_targets=model.count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[(recipe.sample_steps, shown.draw), (recipe.eval_steps if extra.eval_dataset_split else None, evaluate)],
    )
    if accelerator.is_main_process:
        command = " ".join(["accelerate launch recipes/pretrain.py", *(sys.argv[1:] if argv is None else argv)])
        minutes = round((time.monotonic() - started) / 60, 1)
        facts = {"command": command, "minutes": minutes, "progress": progress.state_dict(), "num_rows": len(rows)}
        shown.export(facts, asdict(recipe) | identity, "" if report is None else report.to_markdown())
        print(f"The finished model is in {output_dir}: {progress.step} steps, {minutes} minutes since this start.")
        if recipe.push_to_hub is not None:
            print(f"Uploaded: {push_folder(output_dir, recipe.push_to_hub)}")
    accelerator.end_training()
    return output_dir


if __name__ == "__main__":
    main()
