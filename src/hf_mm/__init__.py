"""Early-fusion text and image models for the Hugging Face ecosystem.

Importing the package makes its families known to transformers and diffusers, so that `AutoModel`, `AutoProcessor`,
`DiffusionPipeline` and `pipeline("text-to-image")` find them.

- `hf_mm.cm3leon`: CM3Leon (arXiv 2309.02591), next-token loss on text and image codes, trained by filling in.
- `hf_mm.transfusion`: Transfusion (arXiv 2408.11039), diffusion on image patches and next-token loss on text.
- `hf_mm.text_to_image`: the transformers pipeline for the task "text-to-image".
- `hf_mm.data`: rows in, tensors out: formats, captions, embedded scenes, encoding, packing, collation.
- `hf_mm.training`: recipes, loop, optimizer, checkpoints.
- `hf_mm.evaluation`: scores that take arrays and callables.
- `hf_mm.hub`: a finished model as a Hub repo folder.
- `hf_mm.cli`: the command `hf-mm`; `hf_mm_command` starts it without loading the package.
"""

import diffusers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from . import cm3leon, transfusion
from .cm3leon import (
    CM3LeonConfig,
    CM3LeonForConditionalGeneration,
    CM3LeonImageProcessor,
    CM3LeonModel,
    CM3LeonPipeline,
    CM3LeonProcessor,
)
from .text_to_image import CHECKPOINTS, DEFAULT_CHECKPOINT, TextToImagePipeline
from .transfusion import (
    TransfusionConfig,
    TransfusionForConditionalGeneration,
    TransfusionImageProcessor,
    TransfusionModel,
    TransfusionPipeline,
    TransfusionProcessor,
)


__version__ = "0.1.0"


def _register_pipeline(name: str, pipeline_class: type[diffusers.DiffusionPipeline]) -> None:
    """Adds a drawing pipeline to `AutoPipelineForText2Image`.

    Loading that class loads every pipeline of diffusers, some of which announce that torchvision is absent; hf_mm
    needs none of them, so they are kept quiet meanwhile.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    logging.set_verbosity(verbosity)
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name] = pipeline_class


def _register_cm3leon() -> None:
    """Makes CM3Leon known to transformers' Auto classes and to diffusers."""
    _register_family(
        CM3LeonConfig, CM3LeonModel, CM3LeonForConditionalGeneration, CM3LeonImageProcessor, CM3LeonProcessor
    )
    # diffusers looks a pipeline and its components up by the name of their folder.
    diffusers.CM3LeonPipeline = CM3LeonPipeline
    diffusers.pipelines.cm3leon = cm3leon
    _register_pipeline("cm3leon", CM3LeonPipeline)


def _register_transfusion() -> None:
    """Makes Transfusion known to transformers' Auto classes and to diffusers."""
    _register_family(
        TransfusionConfig,
        TransfusionModel,
        TransfusionForConditionalGeneration,
        TransfusionImageProcessor,
        TransfusionProcessor,
    )
    diffusers.TransfusionPipeline = TransfusionPipeline
    diffusers.pipelines.transfusion = transfusion
    _register_pipeline("transfusion", TransfusionPipeline)


def _register_family(
    config: type[PreTrainedConfig],
    model: type[PreTrainedModel],
    model_with_head: type[PreTrainedModel],
    image_processor: type,
    processor: type[ProcessorMixin],
) -> None:
    """Makes a family known to transformers' Auto classes and pipelines."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(config, model_with_head, exist_ok=True)
    AutoImageProcessor.register(config, image_processor_classes={"pil": image_processor}, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)
    # Pipelines of transformers check a model's class name against these tables.
    for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        names[config.model_type] = model_with_head.__name__


def _register_text_to_image() -> None:
    """Adds the task "text-to-image" to transformers' pipelines."""
    PIPELINE_REGISTRY.register_pipeline(
        "text-to-image",
        pipeline_class=TextToImagePipeline,
        pt_model=AutoModelForMultimodalLM,
        default={"model": (str(DEFAULT_CHECKPOINT), "main")},
        type="multimodal",
    )


_register_cm3leon()
_register_transfusion()
_register_text_to_image()

__all__ = [
    "CHECKPOINTS",
    "CM3LeonConfig",
    "CM3LeonForConditionalGeneration",
    "CM3LeonImageProcessor",
    "CM3LeonModel",
    "CM3LeonPipeline",
    "CM3LeonProcessor",
    "DEFAULT_CHECKPOINT",
    "TextToImagePipeline",
    "TransfusionConfig",
    "TransfusionForConditionalGeneration",
    "TransfusionImageProcessor",
    "TransfusionModel",
    "TransfusionPipeline",
    "TransfusionProcessor",
]
