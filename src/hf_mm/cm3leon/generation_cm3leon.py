"""How CM3Leon decodes."""

from typing import Any

from transformers.generation import GenerationMixin


class CM3LeonGenerationMixin(GenerationMixin):
    """`generate` for text and for images."""

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Drops the pictures once the cache holds them."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
        return inputs
