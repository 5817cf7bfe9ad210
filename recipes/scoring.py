"""What the evaluating recipes share: drawing scenes from their captions, and scoring the pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm

from hf_mm.data.icon_scenes import BACKGROUND_COLORS, GLYPH_SETS, OBJECT_COLORS, render_glyph
from hf_mm.evaluation.scene_accuracy import scene_accuracy


def load_pipeline(name: str) -> Any:
    """Loads a checkpoint for drawing many pictures, on the accelerator if there is one."""
    pipe = DiffusionPipeline.from_pretrained(name)
    pipe.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    diffusers_logging.disable_progress_bar()
    return pipe


def draw_scenes(
    pipe: Any,
    prompts: list[str],
    *,
    seed: int,
    batch_size: int,
    retrieved: list[list[Mapping[str, Any]]] | None = None,
    verb: str = "draw",
    **drawing: Any,
) -> list[np.ndarray]:
    """Draws one picture per prompt, each from noise of its own.

    Args:
        pipe (`DiffusionPipeline`): Draws.
        prompts (`list[str]`): What.
        seed (`int`): Of the first prompt's noise; the next has the next.
        batch_size (`int`): Pictures drawn at once.
        retrieved (`list[list[dict]]`, *optional*): Documents of each prompt.
        verb (`str`, defaults to `"draw"`): For the progress bar.
        drawing: Settings of the pipeline; those that are None are the model's.

    Returns:
        `list[np.ndarray]`: uint8 pictures.

    Raises:
        ValueError: If the pipeline gives another number of pictures than of prompts.
    """
    settings = {name: value for name, value in drawing.items() if value is not None}
    pictures: list[np.ndarray] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=verb):
        part = slice(start, start + batch_size)
        if retrieved is not None:
            settings["retrieved"] = retrieved[part]
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(prompts[part]))]
        drawn = pipe(prompts[part], generator=generators, **settings).images
        if len(drawn) != len(prompts[part]):
            raise ValueError(f"{len(prompts[part])} `prompts` gave {len(drawn)} pictures. Need one of each.")
        pictures += [np.asarray(image) for image in drawn]
    return pictures


def score_pictures(pictures: Sequence[np.ndarray], scenes: Sequence[str], glyph_set: str) -> dict[str, Any]:
    """Scores pictures against the records of the scenes asked for; see [`scene_accuracy`]."""
    return scene_accuracy(
        pictures,
        scenes,
        glyphs=GLYPH_SETS[glyph_set],
        colors=OBJECT_COLORS,
        backgrounds=BACKGROUND_COLORS,
        render_glyph=render_glyph,
    )
