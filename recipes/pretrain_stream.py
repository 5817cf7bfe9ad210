"""Pretrains on a stream of captioned images: rows are read one after the other, by each process its own.

accelerate launch recipes/pretrain_stream.py --config recipes/configs/transfusion_tiny_pretrain.yaml \
    --eval_dataset_split none --eval_steps none --dataset_name my/pictures --text_column caption --output_dir runs/mine
accelerate launch recipes/pretrain_stream.py --config recipes/configs/transfusion_tiny_pretrain.yaml \
    --eval_dataset_split none --eval_steps none --dataset_name runs/encoded --image_tokenizer_name runs/my_vae \
    --output_dir runs/mine

For sources too large to be read by number, as `recipes/pretrain.py` does: a dataset of the Hub that is not downloaded,
encoded images in more shards than a file system serves at random. Rows are shuffled within blocks. The same command,
in as many processes, goes on at the exact next row. Has no text-only rows, held-out rows, weights and retrieval.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from building import DocumentBatches, ModelArguments, build_model, find_text_tokenizer, load_config, refuse_unfit_rows
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.cm3_masking import SpanArguments
from hf_mm.data.formats import iterate_captions
from hf_mm.data.mixing import DocumentArguments
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.data.streams import ShuffledStream, StreamedBatches
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import prepare_training
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from pretrain import PretrainArguments
from pushing import HubPush
from reporting import RunReport, describe_run, finish_run
from task_sources import iterate_task_texts


@dataclass
class StreamArguments:
    """How a stream is read."""

    shuffle_block_size: int = field(
        default=1000, metadata={"help": "Rows of a process that are held at a time and put in a new order."}
    )


ARGUMENTS = (
    ModelArguments,
    DatasetArguments,
    CaptionArguments,
    DocumentArguments,
    SpanArguments,
    PretrainArguments,
    StreamArguments,
    TrainingRecipe,
)


def refuse_what_needs_all_rows(captions: CaptionArguments, extra: PretrainArguments, recipe: TrainingRecipe) -> None:
    """Refuses fields that need rows by number, before anything is read."""
    asked = {
        "text_dataset_name": extra.text_dataset_name,
        "text_sources": extra.text_sources or None,
        "eval_dataset_name": extra.eval_dataset_name,
        "eval_dataset_split": extra.eval_dataset_split,
        "eval_steps": recipe.eval_steps,
        "near_duplicate_distance": captions.near_duplicate_distance,
        "people_oversampling or high_aesthetic_oversampling": captions.is_weighted or None,
    }
    if given := [name for name, value in asked.items() if value is not None]:
        raise ValueError(
            f"`{given[0]}` needs rows by number, and a stream has none. Set it to none, or use pretrain.py."
        )


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, shows samples on the way, and exports the finished model."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = parse_recipe(*ARGUMENTS, argv=argv)
    model_args, data_args, caption_args, document_args, spans, extra, stream_args, recipe = parsed
    refuse_what_needs_all_rows(caption_args, extra, recipe)
    caption_args.drop_duplicates = False  # a row of the next epoch would be one
    identity = {name: value for arguments in parsed[:-1] for name, value in asdict(arguments).items()}
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    push = HubPush(accelerator, recipe)

    config = load_config(model_args)
    spans = spans.for_objective(getattr(config, "objective", None))
    identity |= asdict(spans)
    rows = open_rows(data_args, image_size=config.image_size, seed=recipe.seed, streaming=True)
    task_texts = iterate_task_texts(extra.tokenizer_sources, config.image_size, recipe.seed)
    tokenizer = find_text_tokenizer(model_args, rows, output_dir, accelerator, task_texts)
    model, processor = build_model(model_args, config, tokenizer)
    refuse_unfit_rows(rows, data_args.dataset_name, model)
    documents = DocumentBatches(model, processor, document_args, spans, caption_args.form_weights())
    documents.refuse_no_caption_room()
    room = documents.limit.caption_room
    caption_args.max_caption_tokens = min(caption_args.max_caption_tokens or room, room)
    rows, _ = prepare_rows(rows, data_args, caption_args, processor.tokenizer, documents.limit)

    parts = prepare_training(accelerator, model, recipe)
    progress = TrainingProgress()
    shares = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    stream = ShuffledStream(rows, recipe.seed, stream_args.shuffle_block_size, **shares)
    build = documents.documents(None, seed=recipe.seed).build
    batch_size, num_workers = recipe.per_device_train_batch_size, recipe.dataloader_num_workers
    batches = StreamedBatches(stream, build, documents.collator(rows), batch_size, num_workers)
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity, batches)
    checkpoints.resume()

    captions = iterate_captions(rows.take(extra.num_samples))
    prompts = extra.sample_prompts or list(itertools.islice(captions, extra.num_samples))
    run_report = RunReport(accelerator, parts, processor, prompts, output_dir)

    def export(folder: Path) -> None:  # by all processes: weights may be sharded
        num_read = progress.step * batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
        facts = describe_run("pretrain_stream.py", argv, accelerator, recipe, num_read, progress)
        run_report.export(folder, facts, asdict(recipe) | identity, "")

    train(
        accelerator,
        parts,
        batches,
        recipe,
        count_targets=model.count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[(recipe.sample_steps, run_report.draw), push.every(export)],
    )
    export(output_dir)
    finish_run(accelerator, push, lambda: f"The finished model is in {output_dir}, after {progress.step} steps.")
    return output_dir


if __name__ == "__main__":
    main()
