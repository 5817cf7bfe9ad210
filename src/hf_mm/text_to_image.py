"""The transformers pipeline for the task "text-to-image", for every family that hf_mm registers.

Each family draws through its own diffusers pipeline; this is the same drawing behind `transformers.pipeline`.
"""

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import Pipeline


CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_CHECKPOINT = CHECKPOINTS / "transfusion-icons"

# What the families' pipelines take beside prompts, and what the task passes on where a family's does.
DRAWING_ARGUMENTS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "num_images_per_prompt",
    "generator",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
)


class TextToImagePipeline(Pipeline):
    """Draws pictures from prompts: `pipeline("text-to-image")("a red star on a white background")`.

    A string gives a picture, a list a list of pictures; with `num_images_per_prompt` above 1 each prompt gives a list.
    Keyword arguments of drawing: `height`, `width`, `guidance_scale`, `num_images_per_prompt`, `generator`; with
    Transfusion `num_inference_steps`; with CM3Leon `do_sample`, `temperature`, `top_k`, `top_p`. Without a model the
    small checkpoint that ships with hf_mm is used.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _pipeline_calls_generate = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawing.set_progress_bar_config(disable=True)

    @cached_property
    def drawing(self) -> DiffusionPipeline:
        """The family's own pipeline."""
        return build_drawing_pipeline(self.model, self.processor)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        parameters = inspect.signature(self.drawing.__call__).parameters
        known = [name for name in DRAWING_ARGUMENTS if name in parameters]
        if unknown := sorted(kwargs.keys() - set(known)):
            raise TypeError(f"unknown arguments {unknown}; drawing takes {known}.")
        return {}, kwargs, {}

    def preprocess(self, inputs: str) -> dict[str, Any]:
        """Passes the prompt on; the family's pipeline encodes it."""
        return {"prompt": inputs}

    def _forward(self, model_inputs: dict[str, Any], **drawing: Any) -> dict[str, Any]:
        prompt = model_inputs["prompt"]
        images = self.drawing(prompt, **drawing).images
        if isinstance(prompt, str):
            return {"images": images}
        share = len(images) // len(prompt)  # a batch is taken apart along this list, one entry per prompt
        return {"images": [images[start : start + share] for start in range(0, len(images), share)]}

    def postprocess(self, model_outputs: dict[str, Any]) -> Image.Image | list[Image.Image]:
        """Unwraps a single picture."""
        images = model_outputs["images"]
        return images[0] if len(images) == 1 else images


def build_drawing_pipeline(model: torch.nn.Module, processor: Any) -> DiffusionPipeline:
    """Builds the diffusers pipeline of a model's family around it, with the scheduler the model asks for, if any.

    Args:
        model (`PreTrainedModel`): Of a family that hf_mm registers.
        processor (`ProcessorMixin`): Its processor.

    Returns:
        `DiffusionPipeline`: sharing `model`.

    Raises:
        ValueError: If the model's family cannot draw.
    """
    name = type(model).__name__.removesuffix("ForConditionalGeneration") + "Pipeline"
    if name not in vars(diffusers):
        raise ValueError(
            f"`model` is a {type(model).__name__}, which does not draw. Give a checkpoint of a family of hf_mm, such "
            "as one trained with recipes/pretrain.py."
        )
    pipeline_class = vars(diffusers)[name]
    components = {"model": model, "processor": processor}
    if "scheduler" in inspect.signature(pipeline_class).parameters:
        components["scheduler"] = model.default_scheduler()
    return pipeline_class(**components)
