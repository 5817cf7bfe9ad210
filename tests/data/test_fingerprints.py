"""Tests that digests tell apart what differs, in every type that weights come in."""

import pytest
import torch

from hf_mm.data.fingerprints import digest_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_changed_weight_changes_the_digest(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(dtype)
    before = digest_weights(model)
    assert digest_weights(model) == before
    with torch.no_grad():
        model[0].weight[1, 2] += 1
    assert digest_weights(model) != before
