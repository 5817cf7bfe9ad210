"""What a step of a pretraining recipe costs: its FLOPs counted and by 6ND, its tokens and images, its parameters."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed

from building import DocumentBatches, build_model, find_text_tokenizer, load_config, refuse_unfit_rows
from hf_mm.data.mixing import StepSampler
from hf_mm.data.sources import open_rows
from hf_mm.evaluation.scaling import count_flops, theoretical_training_flops
from hf_mm.training.recipe import parse_recipe, start_processes
from pretrain import ARGUMENTS
from task_sources import iterate_task_texts


NUM_COUNTED = 4  # batches whose mean is taken: captions differ in length


def edit_model(config: str, edits: Sequence[str]) -> dict[str, Any]:
    """Reads the model file that a training recipe names, with fields changed.

    Args:
        config (`str`): The training recipe.
        edits (`Sequence[str]`): Each `model.FIELD=VALUE`, or `model.FIELD.FIELD=VALUE` for one within another; values
            as in YAML.

    Returns:
        `dict`: the configuration.

    Raises:
        ValueError: If the recipe names no model file.
    """
    arguments, *_ = parse_recipe(*ARGUMENTS, argv=["--config", config])
    if arguments.config_name is None:
        raise ValueError(f"{config} names no `config_name`, the model file that variants change.")
    model = json.loads(Path(arguments.config_name).read_text(encoding="utf-8"))
    for edit in edits:
        place, _, value = edit.removeprefix("model.").partition("=")
        *outer, name = place.split(".")
        inner = model
        for part in outer:
            inner = inner[part]
        inner[name] = yaml.safe_load(value)
    return model


def measure_cost(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Counts what a step of a pretraining costs, over a few batches.

    Args:
        words (`Sequence[str]`): Of `recipes/pretrain.py`.
        folder (`Path`): Gets the text tokenizer, as `text_tokenizer`, where the recipe names none.

    Returns:
        `dict[str, float]`: `num_parameters`, and per step `counted_flops_per_step`, `theoretical_flops_per_step`
        (6ND), `num_tokens_per_step` (text and patches, or text and codes, that are predicted) and
        `num_images_per_step`. Padding and what masks hide are in the counted FLOPs alone.
    """
    model_args, data_args, caption_args, document_args, spans, _, extra, recipe = parse_recipe(*ARGUMENTS, argv=words)
    state = start_processes()
    set_seed(recipe.seed)
    config = load_config(model_args)
    rows = open_rows(data_args, image_size=config.image_size, seed=recipe.seed)
    texts = iterate_task_texts(extra.tokenizer_sources, config.image_size, recipe.seed)
    tokenizer = find_text_tokenizer(model_args, rows, folder, state, texts)
    model, processor = build_model(model_args, config, tokenizer)
    refuse_unfit_rows(rows, data_args.dataset_name, model)
    model.set_attn_implementation("eager")
    documents = DocumentBatches(model, processor, document_args, spans, caption_args.form_weights())
    per_step = recipe.gradient_accumulation_steps
    sampler = StepSampler(len(rows), recipe.per_device_train_batch_size, recipe.seed, batches_per_step=per_step)
    batches = list(islice(documents.endless(rows, None, sampler, recipe.seed, 0), NUM_COUNTED))

    def step() -> None:
        for batch in batches:
            model.train()(**batch).loss.backward()

    counted = count_flops(step)
    num_images, num_tokens = count_targets(model, batches, processor.tokens_per_image())
    num_parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    share = per_step / NUM_COUNTED
    return {
        "num_parameters": num_parameters,
        "counted_flops_per_step": counted * share,
        "theoretical_flops_per_step": theoretical_training_flops(num_parameters, num_tokens) * share,
        "num_tokens_per_step": num_tokens * share,
        "num_images_per_step": num_images * share,
    }


def count_targets(model: Any, batches: Sequence[dict[str, torch.Tensor]], tokens_per_image: int) -> tuple[int, int]:
    """Images of some batches, and tokens and patches that are predicted; codes are tokens already."""
    num_images = num_tokens = num_codes = 0
    for batch in batches:
        counts = {name: int(count) for name, count in model.count_targets(batch).items()}
        num_tokens += counts["num_items_in_batch"]
        if "num_images_in_batch" in counts:
            num_images += counts["num_images_in_batch"]
            num_tokens += counts["num_images_in_batch"] * tokens_per_image
        else:
            num_codes += counts["num_image_items_in_batch"]
    return num_images + round(num_codes / tokens_per_image), num_tokens
