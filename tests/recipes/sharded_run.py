"""Pretrains with sharded weights on the CPU, where accelerate alone would keep them whole without a word.

`AcceleratorState` turns to FSDP for accelerators only; here it does so for processes on the CPU as well. What follows,
`fully_shard` included, is what runs on GPUs.
"""

import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import pretrain  # noqa: E402


unsharded_init = AcceleratorState.__init__


def sharded_init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    unsharded_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = sharded_init  # type: ignore[method-assign]
    pretrain.main()
