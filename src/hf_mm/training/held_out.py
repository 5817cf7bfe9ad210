"""The loss on rows that training does not see. Knows batches and counts, as the loop does."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    count_targets: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor | int]],
    device: torch.device,
) -> dict[str, float]:
    """Averages each part of the loss over all targets of some batches.

    Args:
        model (`nn.Module`): In evaluation mode afterwards.
        batches (`Iterable[dict]`): Finite.
        count_targets (`Callable`): Gives for each part of the loss, by its field of the output, the targets of a
            batch.
        device (`torch.device`): Where the model is.

    Returns:
        `dict[str, float]`: the mean of each part that had a target.
    """
    model.eval()
    sums: dict[str, float] = {}
    totals: dict[str, int] = {}
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        output = model(**batch)
        for part, count in count_targets(batch).items():
            if getattr(output, part) is not None:
                sums[part] = sums.get(part, 0.0) + getattr(output, part).item() * int(count)
                totals[part] = totals.get(part, 0) + int(count)
    return {part: sums[part] / totals[part] for part in sums if totals[part]}
