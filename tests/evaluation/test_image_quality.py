"""Fréchet distance and CLIP score: those of the field's own code, and plain words where samples are few."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from transformers import CLIPModel, CLIPProcessor

from hf_mm.data.clip_encoder import ClipEncoder
from hf_mm.evaluation.image_quality import clip_scores, frechet_distance, sampling_distance


DIMENSION = 13


def features(num, seed, shift=0.0, spread=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(DIMENSION, DIMENSION))
    return (rng.normal(size=(num, DIMENSION)) * spread @ mixing + shift).astype(np.float32)


def test_it_is_the_formula_of_the_paper():
    one, other = features(211, 0), features(173, 1, shift=0.7, spread=1.3)
    means, covariances = zip(
        *((x.mean(0), np.cov(x, rowvar=False)) for x in (one.astype(float), other.astype(float))), strict=True
    )
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, abs=1e-6, rel=1e-9)


def test_it_is_that_of_torch_fidelity():
    fidelity = pytest.importorskip(
        "torch_fidelity.metric_fid", reason="torch-fidelity imports torchvision", exc_type=ImportError
    )
    one, other = features(211, 0), features(173, 1, shift=0.7, spread=1.3)
    statistics = [fidelity.fid_features_to_statistics(torch.from_numpy(x)) for x in (one, other)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, False)[fidelity.KEY_METRIC_FID]
    assert frechet_distance(one, other) == pytest.approx(theirs, abs=1e-3)


def test_features_far_from_zero_lose_no_precision():
    one, other = features(97, 0).astype(np.float64), features(97, 1).astype(np.float64)
    assert frechet_distance(one + 1e3, other + 1e3) == pytest.approx(frechet_distance(one, other), abs=1e-4)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_fewer_samples_than_dimensions_are_told_with_what_that_amounts_to():
    few = features(11, 0)
    halves = sampling_distance(few)
    with pytest.warns(
        UserWarning, match=rf"11 true and 11 drawn samples in 13 .* rank 10 at most.*, 5 each, are {halves:.3g} apart"
    ):
        distance = frechet_distance(few, features(11, 1))
    assert distance > 10 * frechet_distance(features(999, 0), features(999, 1))
    assert halves > 10 * sampling_distance(features(999, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(features(14, 0), features(14, 1))


def test_bad_features_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`drawn_features` has shape \(0, 13\)"):
        frechet_distance(features(20, 0), features(0, 1))
    with pytest.raises(ValueError, match="{'true_features': 13, 'drawn_features': 7}"):
        frechet_distance(features(20, 0), features(20, 0)[:, :7])
    with pytest.raises(ValueError, match="`true_features` has 1 entries that are no finite number"):
        frechet_distance(
            np.where(np.arange(DIMENSION) + np.arange(20)[:, None] == 0, np.nan, features(20, 0)), features(20, 1)
        )
    with pytest.raises(ValueError, match=r"`first_half` has shape \(1, 13\)"):
        sampling_distance(features(3, 0))


class _Tensors(CLIPModel):
    """torchmetrics 1.9 takes the features as tensors; transformers 5 gives them inside an output."""

    def get_image_features(self, *args):
        return super().get_image_features(*args).pooler_output

    def get_text_features(self, *args):
        return super().get_text_features(*args).pooler_output


def test_the_clip_score_is_that_of_torchmetrics(clip_dir):
    from torchmetrics.functional.multimodal import clip_score

    texts = ["a red star on a white background", "an orange kite", "two blue boxes"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    encoder = ClipEncoder.from_pretrained(clip_dir)
    scores = clip_scores(encoder.encode_images([Image.fromarray(one) for one in pixels]), encoder.encode_texts(texts))
    processor = CLIPProcessor.from_pretrained(clip_dir)
    tensors = [torch.from_numpy(one).permute(2, 0, 1) for one in pixels]
    for number in range(3):  # one by one, since the mean is cut at 0
        theirs = clip_score(tensors[number], texts[number], lambda: (_Tensors.from_pretrained(clip_dir), processor))
        assert max(scores[number], 0) == pytest.approx(theirs.item(), abs=1e-3)
    assert np.ptp(scores) > 1


def test_the_clip_score_does_not_ask_for_unit_vectors():
    one, other = np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([[5.0, 5.0], [0.0, -7.0]])
    assert clip_scores(one, other) == pytest.approx([100 / np.sqrt(2), -100])


def test_as_many_texts_as_pictures():
    with pytest.raises(ValueError, match=r"`image_vectors` \(2, 3\) and `text_vectors` \(1, 3\)"):
        clip_scores(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least one pair"):
        clip_scores(np.ones((0, 3)), np.ones((0, 3)))
