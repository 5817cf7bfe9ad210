"""Tunes a pretrained model to follow instructions: editing, structure, layout, questions, captions, conversations.

accelerate launch recipes/sft.py --config recipes/configs/cm3leon_tiny_sft.yaml
accelerate launch recipes/sft.py --config recipes/configs/transfusion_tiny_sft.yaml
accelerate launch recipes/sft.py --config recipes/configs/transfusion_tiny_sft.yaml --lora_rank 4 \
    --output_dir runs/lora
accelerate launch recipes/sft.py --model_name_or_path me/my-model --sources instruct_pix2pix vqa_v2 edit@my/edits \
    --output_dir runs/tuned

The same command goes on where a stopped run was. The output folder is then a Hub repo folder; `tasks.md` in it says
how well each task is done before and after, `tasks/` shows inputs, instructions and outputs.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel

from adapting import ADAPTER, AdapterArguments, add_adapters, describe_adapters, merge_adapters
from building import DocumentBatches, ModelArguments, build_model, load_config, refuse_pixels, refuse_unfit_rows
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.cm3_masking import SpanArguments
from hf_mm.data.mixing import DocumentArguments, StepSampler
from hf_mm.data.sources import DatasetArguments, open_rows, prepare_rows
from hf_mm.data.task_documents import TaskArguments, TaskContent, TaskRows, TaskSourceRows
from hf_mm.data.tasks import WEIGHT_CLIP, mixture_weights
from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import prepare_training
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from pushing import HubPush
from reporting import RunReport, describe_adapter, describe_run, finish_run, first_captions
from task_report import TaskReport
from task_sources import (
    OpenedSource,
    PictureEncoder,
    SourceArguments,
    encode_source,
    keep_fitting,
    open_source,
    spell_shares,
)


REHEARSAL = "rehearsal"
NUM_PROMPTS = 16


@dataclass
class TuningArguments:
    """What tuning shows beside its tasks."""

    edit_template: str | None = field(
        default=None,
        metadata={"help": "How the pipeline lays out a prompt with a picture from now on; none: as tuned here."},
    )
    num_samples: int = field(default=8, metadata={"help": "Examples of each task in the grids."})
    reports_start: bool = field(default=True, metadata={"help": "Whether tasks are scored before training too."})


ARGUMENTS = (
    ModelArguments,
    SourceArguments,
    DatasetArguments,
    CaptionArguments,
    DocumentArguments,
    SpanArguments,
    TaskArguments,
    AdapterArguments,
    TuningArguments,
    TrainingRecipe,
)


def encode_all(
    opened: Sequence[OpenedSource],
    pairs: Any,
    model: Any,
    documents: DocumentBatches,
    recipe: TrainingRecipe,
    accelerator: Accelerator,
) -> list[TaskSourceRows]:
    """Encodes the pictures of all sources, and of the rehearsed pairs if there are any."""
    encoder, size = PictureEncoder.of(model, accelerator), model.config.image_size
    folder = Path(recipe.output_dir) / "encoded"
    sources = []
    for number, source in enumerate(opened):
        rows = keep_fitting(source, documents.limit)
        place = folder / f"{number:02d}-{source.name.split('@')[0]}"
        sources.append(encode_source(source.name, source.task, rows, encoder, size, place, accelerator))
    if pairs is not None:
        sources.append(encode_source(REHEARSAL, None, pairs, encoder, size, folder / REHEARSAL, accelerator))
    return sources


def share_out(sources: Sequence[TaskSourceRows], arguments: SourceArguments) -> dict[str, float]:
    """Returns the share of each source in what is read: within bounds (Sec. 4) but for that of rehearsal."""
    num_rows = {source.name: len(source.rows) for source in sources if source.name != REHEARSAL}
    asked = dict(zip(arguments.sources, arguments.source_shares, strict=True)) if arguments.source_shares else None
    shares = mixture_weights(num_rows, asked, clip=WEIGHT_CLIP if arguments.clips_shares else None)
    if len(num_rows) == len(sources):
        return shares
    tuned = 1 - arguments.rehearsal_share
    return {name: share * tuned for name, share in shares.items()} | {REHEARSAL: arguments.rehearsal_share}


def open_rehearsed(arguments: DatasetArguments, model: Any, documents: DocumentBatches, seed: int) -> Dataset:
    """Opens the pairs of pretraining and refuses, before anything is encoded, what the model cannot read."""
    pairs = open_rows(arguments, image_size=model.config.image_size, seed=seed)
    if "image" not in pairs.column_names:  # encoded before the run, or documents of parts
        refuse_unfit_rows(pairs, arguments.dataset_name, model)
        if documents.encodes_pictures:
            refuse_pixels(pairs, arguments.dataset_name)
    return pairs


def build_batches(
    rows: TaskRows,
    shares: dict[str, float],
    documents: DocumentBatches,
    recipe: TrainingRecipe,
    accelerator: Accelerator,
    first_step: int,
) -> Any:
    """Reads batches, sources by their shares, from the step after `first_step` on."""
    sampler = StepSampler(
        len(rows),
        recipe.per_device_train_batch_size,
        recipe.seed,
        batches_per_step=recipe.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_step=first_step,
        weights=[rows.weights(shares)],
    )
    return documents.endless(rows, None, sampler, recipe.seed, recipe.dataloader_num_workers)


def build_export(
    run_report: RunReport,
    adapted: PeftModel | None,
    describe: Callable[[], dict[str, Any]],
    recipe: dict[str, Any],
    data_report: str,
) -> Callable[[Path], None]:
    """Returns what writes the model as it stands into a folder, and adapters alone; to be called by all processes."""
    adapter = run_report.output_dir / ADAPTER
    merge = None if adapted is None else lambda: merge_adapters(adapted, run_report.output_dir)

    def export(folder: Path) -> None:
        facts = describe()
        run_report.export(folder, facts, recipe, data_report, merge, "instruction_tuning")
        if adapted is not None and run_report.accelerator.is_main_process:
            describe_adapter(adapter, adapted, facts, recipe, data_report)

    return export


def main(argv: Sequence[str] | None = None) -> Path:
    """Tunes, scores tasks on the way, and exports the finished model."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = parse_recipe(*ARGUMENTS, argv=argv)
    model_args, source_args, data_args, caption_args, document_args, spans, task_args, adapters, tuning, recipe = (
        parsed
    )
    identity = {name: value for arguments in parsed[:-1] for name, value in asdict(arguments).items()}
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not given. Name the pretrained checkpoint to tune.")
    output_dir = Path(recipe.output_dir)
    accelerator = build_accelerator(recipe)
    push = HubPush(accelerator, recipe)

    config = load_config(model_args)
    objective = getattr(config, "objective", None)
    spans = spans.for_objective(objective)
    identity |= asdict(spans)
    model, processor = build_model(model_args, config, None)
    if tuning.edit_template is not None:
        processor.edit_template = tuning.edit_template
    documents = DocumentBatches(model, processor, document_args, spans, caption_args.form_weights())
    documents.fill_tasks(TaskContent.for_objective(task_args, objective))
    with accelerator.main_process_first():
        opened = [open_source(spec, source_args, config.image_size, recipe.seed) for spec in source_args.sources]
        pairs = None
        if source_args.rehearsal_share:
            pairs = open_rehearsed(data_args, model, documents, recipe.seed)
            pairs, _ = prepare_rows(pairs, data_args, caption_args, processor.tokenizer, documents.limit)
    sources = encode_all(opened, pairs, model, documents, recipe, accelerator)
    shares, rows = share_out(sources, source_args), TaskRows(sources)
    accelerator.print(told := spell_shares(sources, shares))

    adapted = add_adapters(model, adapters)
    accelerator.print(describe_adapters(model))
    parts = prepare_training(accelerator, model, recipe)
    progress = TrainingProgress()
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    first_step = checkpoints.resume()
    batches = build_batches(rows, shares, documents, recipe, accelerator, first_step)
    prompts = [] if pairs is None else first_captions(pairs, NUM_PROMPTS)
    run_report = RunReport(accelerator, parts, processor, prompts, output_dir)
    tasks = TaskReport(run_report, opened, tuning.num_samples, recipe.seed)
    describe = partial(describe_run, "sft.py", argv, accelerator, recipe, len(rows), progress)
    export = build_export(run_report, adapted, describe, asdict(recipe) | identity, told)
    if first_step == 0 and tuning.reports_start:
        tasks.report(0)
    train(
        accelerator,
        parts,
        batches,
        recipe,
        count_targets=model.count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[(recipe.eval_steps, tasks.report), push.every(export)],
    )
    if recipe.eval_steps and progress.step == recipe.max_steps and progress.step % recipe.eval_steps:
        tasks.report(progress.step)  # what is finished is scored, also where the period does not divide its steps
    export(output_dir)
    finish_run(accelerator, push, lambda: f"The finished model is in {output_dir}, after {progress.step} steps.")
    return output_dir


if __name__ == "__main__":
    main()
