"""Tests that digests tell apart what differs, in every type that weights come in."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from hf_mm.data.fingerprints import digest_encoder, digest_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_changed_weight_changes_the_digest(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(dtype)
    before = digest_weights(model)
    assert digest_weights(model) == before
    with torch.no_grad():
        model[0].weight[1, 2] += 1
    assert digest_weights(model) != before


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_the_digest_of_an_encoder_sees_all_that_decides_what_pictures_become_and_no_more(kind: type) -> None:
    tokenizer = kind(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    before, changing = digest_encoder(tokenizer), set()
    with torch.no_grad():
        for name, weight in tokenizer.named_parameters():
            kept = weight.clone()
            weight.view(-1)[0] += 1
            if digest_encoder(tokenizer) != before:
                changing.add(name.partition(".")[0])
            weight.copy_(kept)
    assert changing == {"encoder", "quant_conv"} | ({"quantize"} if kind is VQModel else set())
