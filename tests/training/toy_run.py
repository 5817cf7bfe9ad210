"""A training run of a ten-line model, for the tests to start in one or two processes, kill and resume."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import ModelOutput

from hf_mm.training.checkpoint import Checkpoints
from hf_mm.training.loop import TrainingProgress, train
from hf_mm.training.optimization import TrainingParts, prepare_training
from hf_mm.training.recipe import TrainingRecipe, build_accelerator, parse_recipe
from hf_mm.training.trackers import end_training


VOCABULARY, WIDTH, LENGTH = 13, 7, 5


@dataclass
class ToyRecipe:
    """What the tests vary."""

    dropout: float = 0.0
    kill_at_step: int | None = None
    signal_at_step: int | None = None
    nan_at_step: int | None = None
    images_of_even_rows_only: bool = False  # in two processes, the second one then has no images at all


@dataclass
class ToyOutput(ModelOutput):
    """The output fields that the loop reads."""

    loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None


class ToyModel(nn.Module):
    """Predicts each token from the one before it, and each image from nothing but a bias."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.image_head = nn.Linear(3, 3)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor,
        num_images_in_batch: torch.Tensor,
        images: torch.Tensor | None = None,
    ) -> ToyOutput:
        logits = self.head(self.dropout(self.embedding(input_ids)))
        text_loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        text_loss = text_loss / num_items_in_batch
        image_loss = None
        if images is not None:
            image_loss = (self.image_head(images) - images.flip(-1)).square().sum() / num_images_in_batch
        loss = text_loss if image_loss is None else text_loss + image_loss
        return ToyOutput(loss=loss, text_loss=text_loss, image_loss=image_loss)


def count_targets(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    num_images = len(batch["images"]) if "images" in batch else 0
    return {"num_items_in_batch": (batch["labels"] != -100).sum(), "num_images_in_batch": torch.tensor(num_images)}


def make_row(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
    labels = input_ids.clone()
    labels[: number % LENGTH] = -100  # rows differ in their number of targets
    images = torch.randn(3, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "images": images, "number": torch.tensor(number)}


def make_batches(recipe: TrainingRecipe, toy: ToyRecipe, first_step: int, rank: int, world: int) -> Iterator[dict]:
    rows_per_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * world
    step = first_step
    while True:
        numbers = range(step * rows_per_step, (step + 1) * rows_per_step)[rank::world]
        for start in range(0, len(numbers), recipe.per_device_train_batch_size):
            rows = [make_row(number) for number in numbers[start : start + recipe.per_device_train_batch_size]]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            if toy.images_of_even_rows_only:
                del batch["images"]
                images = [row["images"] for row in rows if row["number"] % 2 == 0]
                batch |= {"images": torch.stack(images)} if images else {}
            del batch["number"]
            if step + 1 == toy.nan_at_step and rank == 0:
                batch["images"][0, 0] = float("nan")
            yield batch
        step += 1


def start(
    recipe: TrainingRecipe, toy: ToyRecipe, every: tuple[tuple[int, Callable], ...] = ()
) -> tuple[Accelerator, TrainingParts, str]:
    accelerator = build_accelerator(recipe)
    parts = prepare_training(accelerator, ToyModel(toy.dropout), recipe)
    progress = TrainingProgress()
    identity = {name: value for name, value in asdict(toy).items() if "_at_" not in name}
    checkpoints = Checkpoints(accelerator, parts, progress, recipe, identity)
    checkpoints.resume()

    def hurt(step: int) -> None:
        if step == toy.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == toy.signal_at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    rank, world = accelerator.process_index, accelerator.num_processes
    batches = make_batches(recipe, toy, progress.step, rank, world)
    reason = train(
        accelerator,
        parts,
        batches,
        recipe,
        count_targets=count_targets,
        save=checkpoints.save,
        progress=progress,
        every=[(1, hurt), *every],
    )
    return accelerator, parts, reason


def main() -> None:
    recipe, toy = parse_recipe(TrainingRecipe, ToyRecipe)
    accelerator, parts, _ = start(recipe, toy)
    if accelerator.is_main_process:
        weights = accelerator.unwrap_model(parts.model).state_dict()
        torch.save({"weights": weights, "num_processes": accelerator.num_processes}, f"{recipe.output_dir}/end.pt")
    end_training(accelerator)


if __name__ == "__main__":
    main()
