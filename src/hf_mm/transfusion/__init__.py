"""Transfusion: next-token loss on text, diffusion loss on image patches, one transformer (arXiv 2408.11039)."""

from .configuration_transfusion import TransfusionConfig
from .image_processing_transfusion import TransfusionImageProcessor
from .modeling_transfusion import TransfusionForConditionalGeneration, TransfusionModel
from .pipeline_transfusion import TransfusionPipeline
from .processing_transfusion import TransfusionProcessor


__all__ = [
    "TransfusionConfig",
    "TransfusionForConditionalGeneration",
    "TransfusionImageProcessor",
    "TransfusionModel",
    "TransfusionPipeline",
    "TransfusionProcessor",
]
