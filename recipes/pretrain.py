"""Pretrains a model from scratch, or further, on captioned images.

accelerate launch recipes/pretrain.py --config recipes/configs/transfusion_tiny_pretrain.yaml
accelerate launch recipes/pretrain.py --config recipes/configs/transfusion_tiny_pretrain.yaml \
    --dataset_name "my/pictures" --text_column caption --output_dir runs/mine
accelerate launch recipes/pretrain.py --config recipes/configs/cm3leon_tiny_pretrain.yaml  # on codes: see the file

The same command goes on where a stopped run was. The output folder is then a Hub repo folder.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from datasets import Dataset

from building import (
    DocumentBatches,
    HeldOutArguments,
    ModelArguments,
    build_model,
    find_text_tokenizer,
    hold_out,
    load_config,
    refuse_unfit_rows,
)
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.captions import row_weights
from hf_mm.data.cm3_masking import SpanArguments
from hf_mm.data.documents import DocumentLimit, keep_usable_texts, load_texts
from hf_mm.data.mixing import DocumentArguments, StepSampler, document_share
from hf_mm.data.retrieved_documents import MemoryBank, RetrievalArguments, RetrievedPairs
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import prepare_training
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from pushing import HubPush
from reporting import RunReport, describe_run, finish_run, first_captions
from retrieving import TrainingMemory
from task_sources import iterate_task_texts, load_task_texts


@dataclass
class PretrainArguments(HeldOutArguments):
    """What pretraining reads and shows beside its pairs."""

    text_dataset_name: str | None = field(default=None, metadata={"help": "Text-only rows: a Hub id or a folder."})
    text_dataset_config_name: str | None = field(default=None, metadata={"help": "Their configuration."})
    text_dataset_split: str = field(default="train", metadata={"help": "Their split, e.g. train or train[:100000]."})
    text_dataset_column: str = field(default="text", metadata={"help": "Their column."})
    text_sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text-only rows instead: the texts of these tasks of tuning, as in `sources` of recipes/sft.py, "
            "so that a model without a corpus knows the words of its tasks."
        },
    )
    tokenizer_sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks of tuning that a text tokenizer trained here learns the words and numbers of as well, "
            "as in `sources` of recipes/sft.py."
        },
    )
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Of the grids; none: held-out captions."}
    )
    num_samples: int = field(default=16, metadata={"help": "Pictures of a grid without prompts of its own."})

    def __post_init__(self) -> None:
        """Refuses two origins of text-only rows."""
        if self.text_dataset_name is not None and self.text_sources:
            raise ValueError(
                f"`text_dataset_name`={self.text_dataset_name!r} and `text_sources`={self.text_sources} are two "
                "origins of text-only rows. Give one."
            )


ARGUMENTS = (
    ModelArguments,
    DatasetArguments,
    CaptionArguments,
    DocumentArguments,
    SpanArguments,
    RetrievalArguments,
    PretrainArguments,
    TrainingRecipe,
)


class RunRows(NamedTuple):
    """The rows of a run: pairs, text-only rows if any, held-out pairs, and those to retrieve from if any."""

    pairs: Dataset
    texts: Dataset | None
    held_out: Dataset
    memory: MemoryBank | None
    caption_report: str


def open_texts(extra: PretrainArguments, reserved: Sequence[str], open_size: dict[str, Any]) -> tuple[Dataset, int]:
    """Opens the text-only rows that are asked for, without those of no use, and says how many of these there were."""
    if extra.text_sources:
        return keep_usable_texts(load_task_texts(extra.text_sources, **open_size), reserved, "`text_sources`")
    assert extra.text_dataset_name is not None
    return load_texts(
        extra.text_dataset_name,
        split=extra.text_dataset_split,
        config_name=extra.text_dataset_config_name,
        column=extra.text_dataset_column,
        reserved=reserved,
    )


def prepare_run_rows(
    pairs: Dataset,
    tokenizer: Any,
    limit: DocumentLimit,
    data_args: DatasetArguments,
    caption_args: CaptionArguments,
    extra: PretrainArguments,
    memory: TrainingMemory | None,
    open_size: dict[str, Any],
    output_dir: Path,
) -> RunRows:
    """Cleans and filters the pairs so that each fits into a window, and opens the other rows."""
    caption_args.max_caption_tokens = min(caption_args.max_caption_tokens or limit.caption_room, limit.caption_room)
    pairs, report = prepare_rows(pairs, data_args, caption_args, tokenizer, limit)

    def prepare(rows: Dataset, source: DatasetArguments) -> Dataset:
        return prepare_rows(rows, source, caption_args, tokenizer, limit)[0]

    def open_held_out(source: DatasetArguments) -> Dataset:
        rows = open_rows(source, **open_size)
        return prepare(rows if memory is None else memory.join_held_out(rows, source.dataset_name), source)

    pairs, held_out = hold_out(pairs, data_args, extra, open_held_out, open_size["seed"])
    bank = None if memory is None else memory.to_bank(pairs, prepare)
    if report is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "caption_report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    shown = "" if report is None else report.to_markdown()
    if extra.text_dataset_name is None and not extra.text_sources:
        return RunRows(pairs, None, held_out, bank, shown)
    texts, num_dropped = open_texts(extra, tokenizer.all_special_tokens, open_size)
    shown += f"\n\nText-only rows: {len(texts)}; {num_dropped} dropped, empty or with a special token in the text."
    return RunRows(pairs, texts, held_out, bank, shown.strip())


def start_retrieval(rows: RunRows, documents: DocumentBatches, retrieval: RetrievalArguments) -> RunRows:
    """Has documents begin with retrieved pairs, and adds to the report how many; nothing without a memory bank."""
    if rows.memory is None:
        return rows
    counts, dropout = retrieval.retrieved_counts, retrieval.query_caption_dropout
    documents.retrieve(RetrievedPairs(rows.memory, counts=counts, query_caption_dropout=dropout))
    report = f"{rows.caption_report}\n\n{documents.report_retrieval(rows.pairs)}"
    return rows._replace(caption_report=report.strip())


def build_sampler(
    rows: RunRows,
    documents: DocumentBatches,
    caption_args: CaptionArguments,
    document_args: DocumentArguments,
    recipe: TrainingRecipe,
    accelerator: Accelerator,
    first_step: int,
) -> StepSampler:
    """Builds the order in which this process reads the rows, from the step after `first_step` on."""
    share = 0.0
    if rows.texts is not None:
        lengths = (documents.mean_tokens(rows.pairs, rows.texts, source) for source in (1, 0))
        share = document_share(document_args.text_token_share, *lengths)
    return StepSampler(
        len(rows.pairs),
        recipe.per_device_train_batch_size,
        recipe.seed,
        batches_per_step=recipe.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_step=first_step,
        num_text_rows=0 if rows.texts is None else len(rows.texts),
        text_document_share=share,
        weights=row_weights(rows.pairs, caption_args) if caption_args.is_weighted else None,
        final_step=int(recipe.max_steps * (1 - caption_args.final_share)),
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, shows samples on the way, and exports the finished model."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = parse_recipe(*ARGUMENTS, argv=argv)
    model_args, data_args, caption_args, document_args, spans, retrieval, extra, recipe = parsed
    told = [part for part in parsed[:-1] if part is not retrieval or retrieval.neighbors_dir is not None]
    identity = {name: value for arguments in told for name, value in asdict(arguments).items()}
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    push = HubPush(accelerator, recipe)

    config = load_config(model_args)
    spans = spans.for_objective(getattr(config, "objective", None))
    identity |= asdict(spans)
    open_size = {"image_size": config.image_size, "seed": recipe.seed}
    with accelerator.main_process_first():
        pairs = open_rows(data_args, **open_size)
    task_texts = iterate_task_texts(extra.tokenizer_sources, config.image_size, recipe.seed)
    tokenizer = find_text_tokenizer(model_args, pairs, output_dir, accelerator, task_texts)
    model, processor = build_model(model_args, config, tokenizer)
    refuse_unfit_rows(pairs, data_args.dataset_name, model)
    documents = DocumentBatches(model, processor, document_args, spans, caption_args.form_weights())
    documents.refuse_no_caption_room()
    filters = (processor.tokenizer, documents.limit, data_args, caption_args, extra)
    with accelerator.main_process_first():
        memory = TrainingMemory.open(retrieval, pairs, data_args, model, open_size)
        pairs = pairs if memory is None else memory.join(pairs, data_args.dataset_name)
        rows = prepare_run_rows(pairs, *filters, memory, open_size, output_dir)
    rows = start_retrieval(rows, documents, retrieval)
    refuse_unfit_rows(rows.held_out, extra.eval_dataset_name or data_args.dataset_name, model)
    accelerator.print(rows.caption_report)

    parts = prepare_training(accelerator, model, recipe)
    progress = TrainingProgress()
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    first_step = checkpoints.resume()
    sampler = build_sampler(rows, documents, caption_args, document_args, recipe, accelerator, first_step)
    batches = documents.endless(rows.pairs, rows.texts, sampler, recipe.seed, recipe.dataloader_num_workers)

    prompts = extra.sample_prompts or first_captions(rows.held_out, extra.num_samples)
    run_report = RunReport(accelerator, parts, processor, prompts, output_dir)
    held_out = (rows.held_out, extra.num_eval_documents, recipe.per_device_train_batch_size, recipe.seed + 1)
    evaluate = run_report.evaluation(lambda: documents.fixed(*held_out), model.count_targets)
    eval_steps = recipe.eval_steps if extra.eval_dataset_split else None

    def export(folder: Path) -> None:  # by all processes: weights may be sharded
        facts = describe_run("pretrain.py", argv, accelerator, recipe, len(rows.pairs), progress)
        run_report.export(folder, facts, asdict(recipe) | identity, rows.caption_report)

    train(
        accelerator,
        parts,
        batches,
        recipe,
        count_targets=model.count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[(recipe.sample_steps, run_report.draw), (eval_steps, evaluate), push.every(export)],
    )
    export(output_dir)
    finish_run(accelerator, push, lambda: f"The finished model is in {output_dir}, after {progress.step} steps.")
    return output_dir


if __name__ == "__main__":
    main()
