"""What the training recipes show: sample grids, losses on held-out rows, and the finished model with its card."""

import copy
import itertools
import json
import platform
import re
import shutil
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

from hf_mm.cards import HERE, spell_command, without_folders, write_card
from hf_mm.data.formats import iterate_captions
from hf_mm.hub import export_folder
from hf_mm.text_to_image import build_drawing_pipeline
from hf_mm.training.held_out import held_out_loss
from hf_mm.training.history import draw_loss_curves, read_history
from hf_mm.training.loop import TrainingProgress
from hf_mm.training.optimization import TrainingParts, ema_weights, trainable_parameters
from hf_mm.training.recipe import TrainingRecipe
from hf_mm.training.samples import save_captioned_grid
from hf_mm.training.trackers import end_training, log_to_trackers
from pushing import HubPush


CARDS = Path(__file__).parents[1] / "model_cards"
PICTURES = ("samples.png", "reconstructions.png", "loss_curves.png")


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
        `dict`: command, seed, processes, hardware, minutes in training steps, hours of all devices together, rows,
        steps, and what was seen by kind.
    """
    history = read_history(Path(recipe.output_dir) / "history.jsonl") if accelerator.is_main_process else []
    minutes = sum(entry["step_seconds"] for entry in history) * recipe.logging_steps / 60
    return {
        "command": spell_command(script, argv),
        "seed": recipe.seed,
        "num_processes": accelerator.num_processes,
        "hardware": describe_hardware(accelerator.device),
        "minutes": round(minutes, 1),
        "device_hours": round(minutes * accelerator.num_processes / 60, 2),
        "num_rows": num_rows,
        "step": progress.step,
        "num_seen": progress.num_seen,
    }


def describe_hardware(device: torch.device) -> str:
    """Names what one process computes on: the accelerator, or the processor and the threads used of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({device.type}), {torch.get_num_threads()} thread(s)"


def finish_run(accelerator: Accelerator, push: HubPush, finish: Callable[[], str]) -> None:
    """Lets the main process save and publish the results, and closes the trackers. To be called by all processes.

    Args:
        accelerator (`Accelerator`): Of the run.
        push ([`HubPush`]): Publishes, if the recipe says where.
        finish (`Callable[[], str]`): Saves what is left to save, and says where the results are, and how good.
    """
    try:
        if accelerator.is_main_process:
            print(finish())
            if (address := push.finish()) is not None:
                print(f"Uploaded: {address}")
    finally:
        end_training(accelerator)


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
        """Gives the main process the drawing pipeline of the model as it stands, and the others None.

        Nothing is compiled in it: prompts come in many shapes, and their graphs would use up those training may have.
        """
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self.parts.model.parameters())
        if not is_sharded and not self.accelerator.is_main_process:
            yield None
            return
        with self._averaged(), torch.compiler.set_stance("force_eager"):
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
            log_to_trackers(self.accelerator, {f"eval/{name}": value for name, value in losses.items()}, step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
            self.accelerator.print(f"\nStep {step}, held-out rows: {shown}.")

        return evaluate

    def export(
        self,
        folder: Path,
        facts: dict[str, Any],
        recipe: dict[str, Any],
        data_report: str,
        finish_model: Callable[[], Any] | None = None,
        card: str = "pretraining",
    ) -> None:
        """Writes the model as it stands, a last grid and the card into a folder.

        Args:
            folder (`Path`): The output folder at the end; before, another, which gets the newest grid there is.
            facts (`dict`): Of the run, for the card.
            recipe (`dict`): All fields of the run.
            data_report (`str`): What was read and what was dropped, for the card.
            finish_model (`Callable`, *optional*): Returns the model to export in the place of the trained one, such
                as a copy with its adapters merged. Called while the averaged weights are in place.
            card (`str`, defaults to `"pretraining"`): Template in `model_cards/`.
        """
        with self.pipeline() as pipeline:
            if pipeline is None:
                return
            if finish_model is not None:
                pipeline.register_modules(model=finish_model())
            folder.mkdir(parents=True, exist_ok=True)
            if folder == self.output_dir and self.prompts:
                self._save_grid(pipeline, folder / "samples.png")
            elif grids := sorted((self.output_dir / "samples").glob("step-*.png")):
                shutil.copyfile(grids[-1], folder / "samples.png")
            draw_loss_curves(read_history(self.output_dir / "history.jsonl"), folder / "loss_curves.png")
            tasks = self.output_dir / "tasks.md"
            values = card_values(folder, pipeline.model, facts, recipe, data_report)
            export_folder(
                pipeline,
                folder,
                card_template=CARDS / f"{card}.md",
                card_data=describe_model(pipeline.model, recipe),
                card_values={**values, "tasks": tasks.read_text(encoding="utf-8") if tasks.is_file() else ""},
            )


def card_values(
    folder: Path, model: torch.nn.Module, facts: Mapping[str, Any], recipe: Mapping[str, Any], data_report: str
) -> dict[str, Any]:
    """What every template in `model_cards/` is filled with.

    Args:
        folder (`Path`): That the card goes into.
        model (`torch.nn.Module`): Whose weights are counted.
        facts (`Mapping`): From `describe_run`.
        recipe (`Mapping`): All fields of the run.
        data_report (`str`): What was dropped from the data, or how it was mixed.

    Returns:
        `dict`: the slots.
    """
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    return {
        "name": Path(recipe.get("push_to_hub") or folder.resolve().name).name,
        "place": recipe.get("push_to_hub") or HERE,
        "num_parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
        "facts": facts,
        "data": ", ".join(f"`{name}`" for name in without_folders(find_data(recipe))),
        "caption_report": data_report,
        "recipe": json.dumps(without_folders(recipe), indent=2),
        "pictures": pictures,
    }


def describe_adapter(
    folder: Path, adapted: Any, facts: Mapping[str, Any], recipe: Mapping[str, Any], data_report: str
) -> None:
    """Writes the card of adapters that were saved alone, in the place of the one of PEFT; see `card_values`."""
    values = card_values(folder, torch.nn.ParameterList(trainable_parameters(adapted)), facts, recipe, data_report)
    base = find_hub_id(recipe["model_name_or_path"])
    data = {"library_name": "peft", **describe_origin(recipe), "tags": ["lora"]}
    write_card(folder, CARDS / "adapter.md", data, {**values, "base": base or recipe["model_name_or_path"]})


def describe_model(model: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter of a card: what the Hub sorts by."""
    return {**describe_origin(recipe), "tags": ["image-to-text", model.config.model_type]}


def describe_origin(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter of every kind: licence, and what on the Hub the model was made from."""
    data: dict[str, Any] = {"license": "apache-2.0"}
    if base := find_hub_id(recipe.get("model_name_or_path")):
        data["base_model"] = base
    if datasets := [found for name in find_data(recipe) if (found := find_hub_id(name))]:
        data["datasets"] = datasets
    return data


def find_data(recipe: Mapping[str, Any]) -> list[str]:
    """The names of what a run read."""
    names = [recipe.get(field) for field in ("dataset_name", "text_dataset_name")]
    return [name for name in [*names, *recipe.get("sources", []), *recipe.get("text_sources", [])] if name]


def find_hub_id(name: str | None) -> str | None:
    """The Hub id in a name of data or of a model; None where it is of this machine or comes with hf_mm."""
    name = (name or "").rpartition("@")[2]
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
