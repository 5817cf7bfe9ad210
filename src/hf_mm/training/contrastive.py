"""The loss of a CLIP: each picture finds its caption among all of the step's forward passes, and the reverse.

Knows a model with two towers, as transformers' `CLIPModel`. Does not know where pictures and captions come from.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel
from transformers.utils import ModelOutput


# Axes: N pairs of this process, A pairs of all processes, D width of the embeddings.
LOSS_PARTS = ("image_to_text_loss", "text_to_image_loss")
MAX_LOGIT_SCALE = 100.0  # CLIP (arXiv 2103.00020), Sec. 2.5


@dataclass
class ContrastiveOutput(ModelOutput):
    """The loss, its two halves, and what they are computed from.

    Args:
        loss (`torch.FloatTensor` of shape `()`): Mean of the two halves.
        image_to_text_loss (`torch.FloatTensor` of shape `()`): Cross-entropy over captions, in nats.
        text_to_image_loss (`torch.FloatTensor` of shape `()`): Cross-entropy over pictures, in nats.
    """

    loss: torch.Tensor | None = None
    image_to_text_loss: torch.Tensor | None = None
    text_to_image_loss: torch.Tensor | None = None


class _GatherRows(torch.autograd.Function):
    """Joins the rows of all processes; the gradient of a row is summed over all and goes back to where it is from."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Joins the rows of all processes, with gradients; each must have as many. Alone, a process has its own.

    Args:
        rows (`torch.Tensor` of shape `(N, ...)`): Of this process.

    Returns:
        `torch.Tensor` of shape `(A, ...)`: in the order of the processes.
    """
    is_alone = not dist.is_initialized() or dist.get_world_size() == 1
    return rows if is_alone else _GatherRows.apply(rows)


class ContrastiveTrainer(nn.Module):
    """Turns a batch of pictures and captions into the loss of a CLIP.

    Pictures and captions are compared with those of all processes, with gradients to all, so that several processes
    equal one with the whole batch. Micro-batches that are accumulated do not see each other: each is a task by itself.

    Two pairs with the same caption are positives of each other: the target is spread evenly over the equal captions.
    `CLIPModel`'s own loss counts them as negatives, which the caption itself cannot tell from the positive; in batches
    of icon scenes that is not rare. Where all captions differ, the two losses are equal.

    Args:
        model (`CLIPModel`): To be trained.

    Source: CLIP (arXiv 2103.00020), figure 3. Differs: equal captions, as said above.
    """

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def count_targets(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Counts the pairs of a batch."""
        return {"num_images_in_batch": torch.tensor(len(batch["pixel_values"]))}

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        caption_ids: torch.Tensor,
        num_images_in_batch: torch.Tensor | None = None,
    ) -> ContrastiveOutput:
        """Computes the loss.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, 3, H, W)`): From the CLIP's image processor.
            input_ids (`torch.LongTensor` of shape `(N, L)`): The captions.
            attention_mask (`torch.LongTensor` of shape `(N, L)`): 0 on padding.
            caption_ids (`torch.LongTensor` of shape `(N,)`): Equal for equal captions.
            num_images_in_batch (`torch.IntTensor` of shape `()`, *optional*):
                Pairs of the whole step; by default those of all processes.

        Returns:
            `ContrastiveOutput`: sums over this process's pairs, divided by the pairs of the step.
        """
        output = self.model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
        images, texts, captions = map(gather_rows, (output.image_embeds, output.text_embeds, caption_ids))
        num_pairs = len(images) if num_images_in_batch is None else num_images_in_batch
        scale = self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        is_positive = (caption_ids[:, None] == captions).float()  # (N, A)
        targets = is_positive / is_positive.sum(dim=1, keepdim=True)
        with torch.autocast(images.device.type, enabled=False):  # bf16 has steps of 0.5 near a logit of 100
            image_logits = scale * output.image_embeds.float() @ texts.float().T
            text_logits = scale * output.text_embeds.float() @ images.float().T
        image_loss = F.cross_entropy(image_logits, targets, reduction="sum") / num_pairs
        text_loss = F.cross_entropy(text_logits, targets, reduction="sum") / num_pairs
        return ContrastiveOutput((image_loss + text_loss) / 2, image_loss, text_loss)
