"""The loss on rows that training does not see. Knows batches and counts, as the loop does."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    count_targets: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    loss_parts: Mapping[str, str],
    device: torch.device,
) -> dict[str, float]:
    """Averages each part of the loss over all targets of some batches.

    Args:
        model (`nn.Module`): In evaluation mode afterwards.
        batches (`Iterable[dict]`): Finite.
        count_targets (`Callable`): Gives the denominators of a batch.
        loss_parts (`Mapping[str, str]`): Field of the output to the name of its denominator.
        device (`torch.device`): Where the model is.

    Returns:
        `dict[str, float]`: the mean of each part that had a target.
    """
    model.eval()
    sums = dict.fromkeys(loss_parts, 0.0)
    totals = dict.fromkeys(loss_parts, 0)
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        counts = count_targets(batch)
        output = model(**batch)
        for part, denominator in loss_parts.items():
            value = getattr(output, part)
            if value is not None:
                sums[part] += value.item() * int(counts[denominator])
                totals[part] += int(counts[denominator])
    return {part: sums[part] / totals[part] for part in loss_parts if totals[part]}
