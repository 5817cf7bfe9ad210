"""A drawing as it comes: pictures on the way, then the finished ones, each with its seed.

Knows pipelines, not pages: what a page shows it gets from here as plain values.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image


# Showing the state of a drawing costs a decoding and a transfer, so that few are enough.
MAX_PREVIEWS = 8


@dataclass(frozen=True)
class Progress:
    """A drawing as it stands.

    Args:
        pictures (`list[PIL.Image.Image]`): Finished, or on the way; empty before the first step.
        seeds (`list[int]`): One of each.
        step (`int`): Steps done: denoising steps, or rows of codes.
        num_steps (`int`): Of how many.
    """

    pictures: list[Image.Image]
    seeds: list[int]
    step: int = 0
    num_steps: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether these are the pictures, not their making."""
        return bool(self.pictures) and self.step == self.num_steps


def choose_seeds(seed: int | None, num_images: int) -> list[int]:
    """Gives each picture a seed: those that follow the first, which is drawn where none is given.

    Args:
        seed (`int`, *optional*): Of the first picture.
        num_images (`int`): Pictures.

    Returns:
        `list[int]`: a seed for each.

    Raises:
        ValueError: If the seed is negative.
    """
    if seed is not None and seed < 0:
        raise ValueError(f"The seed is {seed}, and must be 0 or above. Leave it empty for a new one.")
    first = torch.seed() % 2**32 if seed is None else seed
    return list(range(first, first + num_images))


def preview(pipeline: Any, tensors: Mapping[str, torch.Tensor]) -> list[Image.Image]:
    """Shows what a pipeline gives to `callback_on_step_end`: noised latents, or the codes so far."""
    if "codes" in tensors:
        return pipeline.preview(tensors["codes"])
    pixels = pipeline.model.decode_image_tokens(tensors["latents"])
    return pipeline.processor.post_process_images(pixels, "pil")


def draw(
    pipeline: Any,
    prompt: str,
    seeds: Sequence[int],
    *,
    documents: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> Iterator[Progress]:
    """Draws in a thread, and shows the pictures on the way; closing the iterator stops the drawing.

    Args:
        pipeline (`DiffusionPipeline`): Of either family.
        prompt (`str`): What to draw.
        seeds (`Sequence[int]`): One of each picture.
        documents (`Sequence[Mapping]`): Retrieved for the prompt: `text`, `score`, and `image` or `codes`.
        options: Further arguments of the pipeline.

    Yields:
        [`Progress`]: at most [`MAX_PREVIEWS`] on the way, and the finished pictures.

    Raises:
        ValueError: If the pipeline refuses the prompt or an option.
    """
    events: queue.Queue[Progress | BaseException] = queue.Queue()
    stop = threading.Event()
    seeds = list(seeds)
    if documents:
        read = [{name: document[name] for name in document if name != "score"} for document in documents]
        options = {**options, "retrieved": [read]}

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        num_steps = pipe.num_timesteps
        if stop.is_set():
            pipe._interrupt = True  # as diffusers' pipelines are stopped
        elif (step + 1) % -(-num_steps // MAX_PREVIEWS) == 0 and step + 1 < num_steps:
            events.put(Progress(preview(pipe, tensors), seeds, step=step + 1, num_steps=num_steps))
        return tensors

    def work() -> None:
        try:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            pictures = pipeline(
                prompt,
                num_images_per_prompt=len(seeds),
                generator=generators,
                callback_on_step_end=step_end,
                **options,
            ).images
            num_steps = pipeline.num_timesteps
            events.put(Progress(pictures, seeds, step=num_steps, num_steps=num_steps))
        except BaseException as error:  # whatever it is, it is raised where the drawing was asked for
            events.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _until_finished(events.get)
    finally:
        stop.set()
        thread.join()


def _until_finished(take: Callable[[], Progress | BaseException]) -> Iterator[Progress]:
    """Passes on what comes, up to the finished pictures or an error."""
    while True:
        event = take()
        if isinstance(event, BaseException):
            raise event
        yield event
        if event.is_finished:
            return
