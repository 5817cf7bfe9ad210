"""The weights of a checkpoint in one plain model, whether processes saved shards of them or one saved them whole.

Knows the files of `checkpoint.py`. Does not know what the model is.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model
from torch import nn

from .optimization import trainable_parameters


SHARDS = "pytorch_model_fsdp_0"  # accelerate's name
WHOLE = "model.safetensors"


def load_consolidated(folder: str | Path, model: nn.Module) -> bool:
    """Loads a checkpoint's weights into a plain model, the moving average where there is one.

    Args:
        folder (`str` or `Path`): A whole checkpoint, as `Checkpoints.save` writes it.
        model (`nn.Module`): As the run built it, in one piece and on the CPU; those weights frozen that were frozen.

    Returns:
        `bool`: whether the weights are the average.

    Raises:
        ValueError: If weights are missing, or of another shape than the model's.
    """
    folder = Path(folder)
    if (folder / SHARDS).is_dir():
        state = model.state_dict()
        with warnings.catch_warnings():  # it says that it reads in one process, as it is told to
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load({"model": state}, checkpoint_id=folder / SHARDS, no_dist=True)
        model.load_state_dict(state)
    elif (folder / WHOLE).is_file():
        load_model(model, folder / WHOLE)
    else:
        raise ValueError(f"{folder} has neither {SHARDS}/ nor {WHOLE}: it holds no weights.")
    files = sorted(folder.glob("ema_*.safetensors"), key=lambda path: int(path.stem.removeprefix("ema_")))
    files = [path for path in (folder / "ema.safetensors", *files) if path.is_file()]
    if files:
        _load_average(files, model)
    return bool(files)


@torch.no_grad()
def _load_average(files: list[Path], model: nn.Module) -> None:
    """Puts the shards of each averaged weight, one behind the other along their first axis, into the model."""
    parts = [load_file(path) for path in files]
    weights = trainable_parameters(model)
    if len(weights) != len(parts[0]):
        raise ValueError(f"{files[0]} averages {len(parts[0])} weights, and the model trains {len(weights)}.")
    for number, weight in enumerate(weights):
        average = torch.cat([part[str(number)] for part in parts]) if len(parts) > 1 else parts[0][str(number)]
        if average.shape != weight.shape:
            raise ValueError(
                f"{files[0]}: average {number} is {tuple(average.shape)}, and the weight {tuple(weight.shape)}."
            )
        weight.copy_(average)
