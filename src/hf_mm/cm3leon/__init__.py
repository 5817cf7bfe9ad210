"""CM3Leon: one causal transformer over text and image codes, trained by filling in (arXiv 2309.02591)."""

from .chameleon_cm3leon import DrawingChameleonForConditionalGeneration
from .configuration_cm3leon import CM3LeonConfig
from .image_processing_cm3leon import CM3LeonImageProcessor
from .logits_cm3leon import CodeSampling
from .modeling_cm3leon import CM3LeonForConditionalGeneration, CM3LeonModel
from .pipeline_cm3leon import CM3LeonPipeline
from .processing_cm3leon import CM3LeonProcessor, extend_tokenizer


__all__ = [
    "CM3LeonConfig",
    "CM3LeonForConditionalGeneration",
    "CM3LeonImageProcessor",
    "CM3LeonModel",
    "CM3LeonPipeline",
    "CM3LeonProcessor",
    "CodeSampling",
    "DrawingChameleonForConditionalGeneration",
    "extend_tokenizer",
]
