"""Codes of the image tokenizer to pixels, for every model here that draws. Knows codes from 0, no vocabulary."""

import torch
from diffusers import VQModel


def upcast(tokenizer: VQModel) -> VQModel:
    """Makes a tokenizer float32 where its `force_upcast` says that it computes in nothing less, as diffusers has it.

    Args:
        tokenizer (`VQModel`): Any; it is changed in place.

    Returns:
        `VQModel`: the same.
    """
    return tokenizer.float() if tokenizer.config.force_upcast else tokenizer


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
    upcast(tokenizer)
    shape = (*codes.shape, tokenizer.quantize.vq_embed_dim)
    if tokenizer.config.lookup_from_codebook:
        return tokenizer.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
    entries = tokenizer.quantize.get_codebook_entry(codes.flatten(), shape)
    return tokenizer.decode(entries, force_not_quantize=True).sample


__all__ = ["decode_codes", "upcast"]
