"""How a codebook is used, and how codes that nothing uses are put where they are needed.

Knows a `VQModel`, counts of its codes and an average of its weights. Does not know the data or the loss.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from torch import nn

from .image_tokenizer_codecs import VQCodec, find_codes
from .loop import TrainingProgress


# Axes: N images, C channels, H W pixels, c latent channels, h w latent pixels, K codes.
class CodebookUsage(NamedTuple):
    """How many of the codes are in use.

    Args:
        used_share (`float`): Share of the codes that occurred at all.
        perplexity (`float`): Exponential of the entropy of how often each occurred: as many codes as would do if all
            were used alike.

    """

    used_share: float
    perplexity: float


def summarize_usage(counts: torch.Tensor) -> CodebookUsage:
    """Summarizes how often each code occurred.

    Args:
        counts (`torch.LongTensor` of shape `(K,)`): Occurrences; all 0 gives a share of 0 and a perplexity of 1.

    Returns:
        `CodebookUsage`.

    """
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return CodebookUsage((counts > 0).double().mean().item(), entropy.exp().item())


@torch.no_grad()
def measure_usage(vq: VQModel, images: Iterable[torch.Tensor]) -> CodebookUsage:
    """Measures the usage of a codebook on images.

    Args:
        vq (`VQModel`): The tokenizer.
        images (`Iterable[torch.FloatTensor]` of shape `(N, C, H, W)`): Batches in [-1, 1].

    Returns:
        `CodebookUsage`.

    """
    counts = torch.zeros(vq.config.num_vq_embeddings, dtype=torch.long)
    for pixel_values in images:
        codes = find_codes(vq, vq.encode(pixel_values).latents)
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
    return summarize_usage(counts)


def save_usage(vq: VQModel, images: Iterable[torch.Tensor], num_pictures: int, folder: Path) -> str:
    """Measures the usage of a codebook and writes it into `codebook_usage.json`.

    Args:
        vq (`VQModel`): The tokenizer.
        images (`Iterable[torch.FloatTensor]` of shape `(N, C, H, W)`): Batches in [-1, 1].
        num_pictures (`int`): How many they are together.
        folder (`Path`): Where to.

    Returns:
        `str`: what was measured, for people.

    """
    usage = measure_usage(vq, images)
    text = json.dumps({**usage._asdict(), "num_pictures": num_pictures}, indent=2)
    (folder / "codebook_usage.json").write_text(text, encoding="utf-8")
    return f"{usage.used_share:.1%} of its codes in use, perplexity {usage.perplexity:.1f}"


@torch.no_grad()
def draw_codes(
    vq: VQModel,
    latents: torch.Tensor,
    num_codes: int,
    generator: torch.Generator,
    *,
    is_dead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws latent pixels to be codes, each in proportion to its squared distance to the nearest code there is.

    Each drawn code counts for the draws after it, so that what fills pictures, such as a plain background, becomes a
    code once and not many times over.

    Source: k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        vq (`VQModel`): The tokenizer.
        latents (`torch.FloatTensor` of shape `(N, c, h, w)`): From `vq.encode`.
        num_codes (`int`): How many to draw.
        generator (`torch.Generator`): On the CPU.
        is_dead (`torch.BoolTensor` of shape `(K,)`, *optional*):
            Codes that are to be replaced and count for none, unless all are.

    Returns:
        `torch.FloatTensor` of shape `(at most num_codes, c)`: Fewer where fewer latent pixels are no codes yet.

    """
    codes = vq.quantize.embedding.weight
    if is_dead is not None and not bool(is_dead.all()):
        codes = codes[~is_dead]
    pixels = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (N h w, c)
    distances = (pixels - codes[torch.cdist(pixels, codes).argmin(dim=1)]).square().sum(dim=-1)
    drawn = []
    for value in torch.rand(num_codes, generator=generator).to(pixels.device):
        reached = distances.double().cumsum(dim=0)
        if not bool(reached[-1] > 0):
            break
        code = pixels[torch.searchsorted(reached, value * reached[-1], right=True).clamp(max=len(pixels) - 1)]
        drawn.append(code)
        distances = torch.minimum(distances, (pixels - code).square().sum(dim=-1))
    return torch.stack(drawn) if drawn else pixels[:0]


class CodebookUpkeep:
    """Reports the usage of the codebook since the last call, and revives the codes that were not used.

    What is drawn depends on the seed, the step and the weights alone, and is the main process's, so all processes have
    the same codes, and a resumed run goes on as one that was never stopped. When quantization begins, all are drawn.

    Args:
        codec (`VQCodec`): Holds the codes and their counts.
        ema (`EMAModel`, *optional*): The average of the weights; a revived code enters it as it is.
        averaged (`Sequence[nn.Parameter]`): The parameters that the average is of, in its order.
        read_images (`Callable[[torch.Generator], torch.Tensor]`): Draws images `(N, C, H, W)` in [-1, 1].
        progress (`TrainingProgress`): Takes `used_code_share` and `code_perplexity` into the log. A resumed one tells
            whether quantization has begun.
        seed (`int`): Of the run.
        first_quantized_step (`int`, defaults to 0): Until the call of this step the codec does not quantize.
        last_revival_step (`int`, *optional*): From the step after it on codes are left as they are; none: never.

    """

    def __init__(
        self,
        codec: VQCodec,
        ema: EMAModel | None,
        averaged: Sequence[nn.Parameter],
        read_images: Callable[[torch.Generator], torch.Tensor],
        progress: TrainingProgress,
        *,
        seed: int,
        first_quantized_step: int = 0,
        last_revival_step: int | None = None,
    ) -> None:
        self.codec, self.read_images, self.progress, self.seed = codec, read_images, progress, seed
        self.first_quantized_step, self.last_revival_step = first_quantized_step, last_revival_step
        codec.is_quantizing = progress.step >= first_quantized_step
        weight = codec.vq.quantize.embedding.weight
        self.code_tables = [weight.data]
        if ema is not None:
            number = next(number for number, parameter in enumerate(averaged) if parameter is weight)
            self.code_tables.append(ema.shadow_params[number])

    def __call__(self, step: int) -> None:
        """Reports, revives, and counts anew; called by all processes after the same steps."""
        counts = self.codec.code_counts
        if step < self.first_quantized_step:
            return
        self.codec.is_quantizing = True
        if step > self.first_quantized_step:
            usage = summarize_usage(counts)
            self.progress.add("used_code_share", usage.used_share)
            self.progress.add("code_perplexity", usage.perplexity)
        if step == self.first_quantized_step or self.last_revival_step is None or step <= self.last_revival_step:
            self._revive(counts == 0, step)
        counts.zero_()

    @torch.no_grad()
    def _revive(self, is_dead: torch.Tensor, step: int) -> None:
        dead = is_dead.nonzero().flatten()
        if not len(dead):
            return
        state = np.random.SeedSequence((self.seed, step)).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]))  # which heeds 32 bits only
        vq = self.codec.vq
        latents = vq.encode(self.read_images(generator).to(dead.device)).latents.float()
        codes = broadcast(draw_codes(vq, latents, len(dead), generator, is_dead=is_dead))
        for table in self.code_tables:
            table[dead[: len(codes)]] = codes.to(table.dtype)
