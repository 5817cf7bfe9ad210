"""Pretrains with sharded weights on the CPU, where accelerate alone would keep them whole without a word.

`AcceleratorState` turns to FSDP for accelerators only; here it does so for processes on the CPU as well. What follows,
`fully_shard` included, is what runs on GPUs. `precisions.json` in the output folder then says in which precision each
sharded group of layers gathered its weights, added up its gradients, and what it rounded.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule


sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import pretrain  # noqa: E402
from hf_mm.training.optimization import TrainingParts  # noqa: E402
from hf_mm.training.recipe import TrainingRecipe  # noqa: E402


unsharded_init = AcceleratorState.__init__
prepare_training = pretrain.prepare_training


def sharded_init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    unsharded_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def write_precisions(accelerator: Accelerator, model: nn.Module, recipe: TrainingRecipe) -> TrainingParts:
    parts = prepare_training(accelerator, model, recipe)
    groups = [part for part in parts.model.modules() if isinstance(part, FSDPModule)]
    policies = [asdict(group._get_fsdp_state()._mp_policy) for group in groups]
    if accelerator.is_main_process:
        path = Path(recipe.output_dir) / "precisions.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(policies, default=str))
    return parts


if __name__ == "__main__":
    AcceleratorState.__init__ = sharded_init  # type: ignore[method-assign]
    pretrain.prepare_training = write_precisions
    pretrain.main()
