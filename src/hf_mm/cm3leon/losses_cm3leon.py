"""A loss over many positions in pieces, so that the scores of all of them are never held at once.

Knows a function that sums losses, not what is scored. The gradients of a piece are taken as soon as its scores are
there, so nothing is computed a second time in the backward pass.
"""

# Axes: T positions, D hidden.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


Sums = tuple[torch.Tensor, ...]
SumLosses = Callable[[torch.Tensor, torch.Tensor], Sums]


class SumOfPieces(torch.autograd.Function):
    """Sums of losses whose gradients are known when they are."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        sum_losses: SumLosses,
        num_positions: int,
        targets: torch.Tensor,
        hidden: torch.Tensor,
        *weights: torch.Tensor,
    ) -> Sums:
        """Takes sums and gradients piece by piece."""
        sums, hidden_grads, weight_grads = [], [], [torch.zeros_like(weight) for weight in weights]
        for piece, wanted in zip(hidden.split(num_positions), targets.split(num_positions), strict=True):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                found = sum_losses(leaf.view_as(leaf), wanted)  # hooks of modules may wait for no leaf
                grads = torch.autograd.grad(found[0], [leaf, *weights], materialize_grads=True)
            sums.append([value.detach() for value in found])
            hidden_grads.append(grads[0])
            for total, grad in zip(weight_grads, grads[1:], strict=True):
                total += grad
        ctx.save_for_backward(torch.cat(hidden_grads), *weight_grads)
        first, *others = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        ctx.mark_non_differentiable(*others)
        return first, *others

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *others: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Scales the gradients; only the first sum has one."""
        return None, None, None, *(kept * grad for kept in ctx.saved_tensors)


def sum_in_pieces(
    sum_losses: SumLosses,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    num_positions: int,
    weights: Sequence[torch.Tensor],
) -> Sums:
    """Sums losses over all positions, of which so many are scored at a time.

    Args:
        sum_losses (`Callable`):
            Gives sums over positions; the first may be differentiated, by the hidden states and by `weights`.
        hidden (`torch.FloatTensor` of shape `(num_targets, hidden_size)`): What is scored.
        targets (`torch.LongTensor` of shape `(num_targets,)`): What should come next.
        num_positions (`int`): Positions of a piece.
        weights (`Sequence[torch.Tensor]`): Trainable weights that `sum_losses` goes through.

    Returns:
        `tuple[torch.Tensor, ...]`: the sums, as of one piece.
    """
    if len(hidden) <= num_positions:
        return sum_losses(hidden, targets)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return SumOfPieces.apply(sum_losses, num_positions, targets, hidden, *weights)
    pieces = zip(hidden.split(num_positions), targets.split(num_positions), strict=True)
    # A compiled graph takes no gradients on the way, and computes the scores again instead.
    sums = [checkpoint(sum_losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return tuple(torch.stack(values).sum() for values in zip(*sums, strict=True))
