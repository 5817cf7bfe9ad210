"""Codes of the image tokenizer to pixels, for every model here that draws. Knows codes from 0, no vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import VQModel


@contextmanager
def full_precision(tokenizer: VQModel) -> Iterator[None]:
    """Lets a tokenizer compute in float32, and in nothing less, where its `force_upcast` asks for it.

    It becomes float32 in place. Autocast is off meanwhile, and so is TF32, which convolutions have on by default.

    Args:
        tokenizer (`VQModel`): Any; one that does not ask computes as it would.

    Yields:
        None.
    """
    if not tokenizer.config.force_upcast:
        yield
        return
    tokenizer.float()
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        with torch.autocast(tokenizer.device.type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = before


@torch.no_grad()
def decode_codes(tokenizer: VQModel, codes: torch.Tensor) -> torch.Tensor:
    """Turns codes into pictures.

    Args:
        tokenizer (`VQModel`): Whatever its `lookup_from_codebook`, which says what its `decode` is given: codes or
            the entries of its codebook.
        codes (`torch.LongTensor` of shape `(num_images, rows, columns)`): In `[0, codebook_size)`.

    Returns:
        `torch.FloatTensor` of shape `(num_images, channels, height, width)`: in [-1, 1] but for overshoots.
    """
    shape = (*codes.shape, tokenizer.quantize.vq_embed_dim)
    with full_precision(tokenizer):
        if tokenizer.config.lookup_from_codebook:
            return tokenizer.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
        entries = tokenizer.quantize.get_codebook_entry(codes.flatten(), shape)
        return tokenizer.decode(entries, force_not_quantize=True).sample


__all__ = ["decode_codes", "full_precision"]
