"""Low-rank adapters for the recipes: put into a model, saved alone, merged into a copy.

`PeftModel.from_pretrained(base, folder / "adapter")` opens those that were saved alone. The `load_adapter` of
transformers 5.23 does so for LoRA, but leaves out the sizes that DoRA tunes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from building import find_image_tokenizer


ADAPTER = "adapter"


@dataclass
class AdapterArguments:
    """Whether all weights are tuned or low-rank adapters (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353)."""

    lora_rank: int = field(default=0, metadata={"help": "Rank of the adapters; 0: all weights are tuned."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapters; none: twice the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    use_dora: bool = field(default=False, metadata={"help": "Whether adapters tune the size of weights apart."})
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Last names of layers that get adapters; none: all linear ones."},
    )
    lora_modules_to_save: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Ends of names of parts that are tuned whole beside them and saved with them, such as norm."
        },
    )

    def __post_init__(self) -> None:
        """Refuses values out of range, and fields that nothing would read."""
        if self.lora_rank < 0:
            raise ValueError(f"`lora_rank`={self.lora_rank} must be at least 0.")
        names = ("use_dora", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
        if self.lora_rank == 0 and (
            given := [name for name in names if getattr(self, name) not in (False, None, 0, [])]
        ):
            raise ValueError(f"`{given[0]}`={getattr(self, given[0])} needs a `lora_rank` above 0.")


def add_adapters(model: Any, arguments: AdapterArguments) -> PeftModel | None:
    """Puts adapters into a model in place and freezes the rest of it; None where all weights are tuned.

    Args:
        model (`PreTrainedModel`): To be tuned. It stays what it is, with adapters in its layers.
        arguments (`AdapterArguments`): Of the recipe.

    Raises:
        ValueError: If the model has no part of a name that is given, or rows that are held.
    """
    if arguments.lora_rank == 0:
        return None
    if arguments.lora_modules_to_save and any(hasattr(weight, "held_rows") for weight in model.parameters()):
        raise ValueError(
            f"`lora_modules_to_save`={arguments.lora_modules_to_save} trains copies, in which `trains_code_embeddings`"
            "=False holds nothing. Leave one of the two out."
        )
    settings = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_rank,
        lora_dropout=arguments.lora_dropout,
        use_dora=arguments.use_dora,
        target_modules=arguments.lora_target_modules or find_linear_layers(model),
        modules_to_save=find_parts(model, arguments.lora_modules_to_save) or None,
    )
    return get_peft_model(model, settings)


def find_linear_layers(model: Any) -> list[str]:
    """Names the linear layers of the transformer itself: those of its blocks, by their last names."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    return sorted(names)


def find_parts(model: Any, ends: Sequence[str]) -> list[str]:
    """Names the parts of a model whose names end so, but for those of its image tokenizer, which is never tuned.

    Raises:
        ValueError: If there is none for one of the ends.
    """
    tokenizer = find_image_tokenizer(model)
    frozen = set() if tokenizer is None else set(tokenizer.modules())
    names = [name for name, part in model.named_modules() if part not in frozen]
    for end in ends:
        if not any(name.endswith(end) for name in names):
            raise ValueError(
                f"`lora_modules_to_save`: no part of {type(model).__name__} has a name that ends in {end!r}."
            )
    return [name for name in names if name.endswith(tuple(ends))]


def describe_adapters(model: Any) -> str:
    """Says what share of the weights is tuned."""
    tuned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    return f"{tuned:,} of {total:,} weights are tuned ({tuned / total:.1%})."


def merge_adapters(adapted: PeftModel, output_dir: Path) -> Any:
    """Saves the adapters alone, in `adapter/`, and returns a copy of the model with them merged into its weights."""
    adapted.save_pretrained(output_dir / ADAPTER)
    return copy.deepcopy(adapted).merge_and_unload()
