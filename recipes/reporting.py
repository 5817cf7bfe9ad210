"""What the training recipes show: sample grids, losses on held-out rows, and the finished model with its card."""

import copy
import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING

from hf_mm.data.formats import iterate_captions
from hf_mm.hub import export_folder, push_folder
from hf_mm.text_to_image import build_drawing_pipeline
from hf_mm.training.held_out import held_out_loss
from hf_mm.training.history import read_history
from hf_mm.training.loop import TrainingProgress
from hf_mm.training.optimization import TrainingParts, ema_weights, trainable_parameters
from hf_mm.training.recipe import TrainingRecipe
from hf_mm.training.samples import save_captioned_grid


CARD_TEMPLATE = Path(__file__).parents[1] / "model_cards" / "pretraining.md"


def count_loss_parts(counts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tells the targets of each part of the loss: images stand beside the items, codes of images are among them."""
    num_items = counts["num_items_in_batch"]
    if "num_images_in_batch" in counts:
        return {"text_loss": num_items, "image_loss": counts["num_images_in_batch"]}
    num_codes = counts["num_image_items_in_batch"]
    return {"text_loss": num_items - num_codes, "image_loss": num_codes}


def first_captions(rows: Dataset, num_rows: int) -> list[str]:
    """The first caption of each of the first rows that have one, as prompts where a recipe names none."""
    captions = (next(iterate_captions(rows.select([number])), None) for number in range(len(rows)))
    return list(itertools.islice(filter(None, captions), num_rows))


def describe_run(
    script: str,
    argv: Sequence[str],
    accelerator: Accelerator,
    recipe: TrainingRecipe,
    num_rows: int,
    progress: TrainingProgress,
) -> dict[str, Any]:
    """Lists what a model card says of a finished run.

    Args:
        script (`str`): File name of the recipe.
        argv (`Sequence[str]`): Its command line.
        accelerator (`Accelerator`): Of the run.
        recipe (`TrainingRecipe`): Of the run.
        num_rows (`int`): Rows that it read from.
        progress (`TrainingProgress`): How far it came.

    Returns:
        `dict`: command, processes, minutes in training steps, rows, steps, and what was seen by kind.
    """
    history = read_history(Path(recipe.output_dir) / "history.jsonl") if accelerator.is_main_process else []
    return {
        "command": f"recipes/{script} {shlex.join(argv)}",
        "num_processes": accelerator.num_processes,
        "minutes": round(sum(entry["step_seconds"] for entry in history) * recipe.logging_steps / 60, 1),
        "num_rows": num_rows,
        "step": progress.step,
        "num_seen": progress.num_seen,
    }


def finish_run(accelerator: Accelerator, recipe: TrainingRecipe, finish: Callable[[], str]) -> None:
    """Lets the main process save and upload the results, and closes the trackers. To be called by all processes.

    Args:
        accelerator (`Accelerator`): Of the run.
        recipe (`TrainingRecipe`): With the folder and the Hub repo.
        finish (`Callable[[], str]`): Saves what is left to save, and says where the results are, and how good.
    """
    if accelerator.is_main_process:
        print(finish())
        if recipe.push_to_hub is not None:
            print(f"Uploaded: {push_folder(recipe.output_dir, recipe.push_to_hub)}")
    accelerator.end_training()


def gather_model(model: torch.nn.Module) -> torch.nn.Module | None:
    """Makes a plain model of sharded weights. To be called by all processes, each of which gives its shards.

    Args:
        model (`PreTrainedModel`): With `DTensor` parameters, as `fully_shard` leaves them.

    Returns:
        `PreTrainedModel` or `None`: On the main process a copy in the CPU's memory, on the others nothing.
    """
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not weights:  # only the main process is given any
        return None
    model_class = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(model.config)]  # sharding has changed that of the model itself
    config = copy.deepcopy(model.config)  # loading writes to it
    plain = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype)
    plain.generation_config = model.generation_config
    return plain


class RunReport:
    """Shows how far a run has come, always with the averaged weights.

    Every action is to be called by all processes. The main one draws; where the weights are sharded the others give it
    their shards, and it draws from a plain copy, for which its device needs room. Elsewhere nothing is copied.

    Args:
        accelerator (`Accelerator`): Of the run.
        parts (`TrainingParts`): The model and its averaged weights.
        processor (`ProcessorMixin`): Of the model.
        prompts (`list[str]`): Of the sample grids.
        output_dir (`Path`): Of the run.
    """

    def __init__(
        self, accelerator: Accelerator, parts: TrainingParts, processor: Any, prompts: list[str], output_dir: Path
    ) -> None:
        self.accelerator, self.parts, self.processor = accelerator, parts, processor
        self.prompts, self.output_dir = prompts, output_dir

    def _averaged(self) -> Any:
        """Puts the averaged weights in place for a `with` block."""
        return ema_weights(self.parts.ema, trainable_parameters(self.parts.model))

    @contextmanager
    def pipeline(self) -> Iterator[Any]:
        """Gives the main process the drawing pipeline of the model as it stands, and the others None."""
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self.parts.model.parameters())
        if not is_sharded and not self.accelerator.is_main_process:
            yield None
            return
        with self._averaged():
            model = self.accelerator.unwrap_model(self.parts.model)
            if is_sharded:
                model = gather_model(model)
            if model is None:
                yield None
                return
            pipeline = build_drawing_pipeline(model.to(self.accelerator.device).eval(), self.processor)
            pipeline.set_progress_bar_config(disable=True)
            yield pipeline

    def _save_grid(self, pipeline: Any, path: Path) -> None:
        """Draws the prompts from fixed noise."""
        images = pipeline(self.prompts, generator=torch.Generator(pipeline.device).manual_seed(0)).images
        save_captioned_grid(images, self.prompts, path)

    def draw(self, step: int) -> None:
        """Saves a grid of samples."""
        path = self.output_dir / "samples" / f"step-{step:06d}.png"
        with self.pipeline() as pipeline:
            if pipeline is not None:
                self._save_grid(pipeline, path)
        self.accelerator.print(f"\nStep {step}: samples in {path}.")

    def evaluation(
        self, batches: Callable[[], Iterator[dict[str, torch.Tensor]]], count_targets: Callable[..., Any]
    ) -> Callable[[int], None]:
        """Returns the action that logs the loss on held-out rows."""

        def count_parts(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return count_loss_parts(count_targets(batch))

        def evaluate(step: int) -> None:
            with self._averaged():
                model = self.accelerator.unwrap_model(self.parts.model)
                losses = held_out_loss(model, batches(), count_parts, self.accelerator.device)
            self.accelerator.log({f"eval/{name}": value for name, value in losses.items()}, step=step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
            self.accelerator.print(f"\nStep {step}, held-out rows: {shown}.")

        return evaluate

    def export(
        self,
        facts: dict[str, Any],
        recipe: dict[str, Any],
        caption_report: str,
        finish_model: Callable[[], Any] | None = None,
    ) -> None:
        """Writes the finished model, a last grid and the card into the output folder.

        Args:
            facts (`dict`): Of the run, for the card.
            recipe (`dict`): All fields of the run.
            caption_report (`str`): What was read, for the card.
            finish_model (`Callable`, *optional*): Returns the model to export in the place of the trained one, such
                as a copy with its adapters merged. Called while the averaged weights are in place.
        """
        with self.pipeline() as pipeline:
            if pipeline is None:
                return
            if finish_model is not None:
                pipeline.register_modules(model=finish_model())
            if self.prompts:
                self._save_grid(pipeline, self.output_dir / "samples.png")
            export_folder(
                pipeline,
                self.output_dir,
                card_template=CARD_TEMPLATE,
                card_data={"license": "apache-2.0", "tags": ["image-to-text", pipeline.model.config.model_type]},
                card_values={
                    "facts": facts,
                    "recipe": json.dumps(recipe, indent=2),
                    "caption_report": caption_report,
                },
            )
