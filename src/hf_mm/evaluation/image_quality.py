"""How much drawn pictures look like true ones, and like their prompts: Fréchet distance and CLIP score.

Knows vectors of pictures and texts, `(samples, dimension)`; which network made them is the caller's choice.
"""

import warnings

import numpy as np
import torch


def frechet_distance(true_features: np.ndarray, drawn_features: np.ndarray) -> float:
    """Computes the Fréchet distance between two sets of features, FID where they are Inception's.

    Statistics are in double precision. The estimate is biased upwards, the more the fewer samples there are; with
    fewer than there are dimensions the covariances have no full rank, and a warning says what that alone amounts to.

    Args:
        true_features (`np.ndarray` of shape `(num_true, dimension)`): Of true pictures.
        drawn_features (`np.ndarray` of shape `(num_drawn, dimension)`): Of drawn pictures.

    Returns:
        `float`: 0 for equal means and covariances, without an upper end.

    Raises:
        ValueError: If a set has fewer than two samples, or features are no number or differ in dimension.

    Source: Heusel et al. (arXiv 1706.08500), Eq. 6, through torchmetrics.
    """
    _check_features(true_features=true_features, drawn_features=drawn_features)
    if min(len(true_features), len(drawn_features)) <= true_features.shape[1]:
        _warn_of_rank(true_features, len(drawn_features))
    return _distance(true_features, drawn_features)


def sampling_distance(features: np.ndarray, seed: int = 0) -> float:
    """Computes the Fréchet distance between two random halves of one set: what sampling alone amounts to.

    Endless halves would be 0 apart. A distance between other sets of the size of a half means something only beyond
    this one.

    Args:
        features (`np.ndarray` of shape `(num_samples, dimension)`): Of at least four pictures.
        seed (`int`, defaults to 0): Of the halving.

    Returns:
        `float`: the distance.

    Raises:
        ValueError: If there are fewer than four samples, or a feature is no number.
    """
    half = len(features) // 2
    order = np.random.default_rng(seed).permutation(len(features))
    _check_features(first_half=features[order[:half]], second_half=features[order[half : 2 * half]])
    return _distance(features[order[:half]], features[order[half : 2 * half]])


def clip_scores(image_vectors: np.ndarray, text_vectors: np.ndarray) -> np.ndarray:
    """Computes how well each picture fits its own text: 100 times the cosine of their vectors.

    Args:
        image_vectors (`np.ndarray` of shape `(num_pairs, dimension)`): Of any length but zero.
        text_vectors (`np.ndarray` of shape `(num_pairs, dimension)`): Of the text of each picture.

    Returns:
        `np.ndarray` of shape `(num_pairs,)`: from -100 to 100; the CLIP score of a model is the mean.

    Raises:
        ValueError: If the shapes differ, or there is no pair.

    Source: Hessel et al. (arXiv 2104.08718), Sec. 3. Differs: scaled by 100 and not cut at 0, as in torchmetrics.
    """
    if image_vectors.shape != text_vectors.shape or image_vectors.ndim != 2 or not len(image_vectors):
        raise ValueError(
            f"`image_vectors` {image_vectors.shape} and `text_vectors` {text_vectors.shape} must both have the shape "
            "(num_pairs, dimension), with one text per picture and at least one pair."
        )
    images, texts = image_vectors.astype(np.float64), text_vectors.astype(np.float64)
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return 100 * (images * texts).sum(1) / lengths


class _Given(torch.nn.Module):
    """Stands for the feature network where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The Fréchet distance needs torchmetrics, which lacks `{error.name}`. Install it with "
            "`pip install 'hf_mm[eval]'`; where torch-fidelity is installed, torchmetrics needs torchvision as well."
        ) from error
    metric = FrechetInceptionDistance(feature=_Given(one.shape[1]))
    metric.update(torch.from_numpy(one.astype(np.float64)), real=True)
    metric.update(torch.from_numpy(other.astype(np.float64)), real=False)
    return float(metric.compute())


def _check_features(**sets: np.ndarray) -> None:
    for name, features in sets.items():
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"`{name}` has shape {features.shape}; need (samples, dimension) with at least 2 samples."
            )
        if not np.isfinite(features).all():
            raise ValueError(f"`{name}` has {int((~np.isfinite(features)).sum())} entries that are no finite number.")
    dimensions = {name: features.shape[1] for name, features in sets.items()}
    if len(set(dimensions.values())) > 1:
        raise ValueError(f"Features differ in dimension: {dimensions}. Make both with the same network.")


def _warn_of_rank(true_features: np.ndarray, num_drawn: int) -> None:
    num_true, dimension = true_features.shape
    rank = min(num_true, num_drawn) - 1
    message = (
        f"{num_true} true and {num_drawn} drawn samples in {dimension} feature dimensions: a covariance has rank "
        f"{rank} at most, and the Fréchet distance is too large."
    )
    if num_true >= 4:
        message += f" Two halves of the true samples, {num_true // 2} each, are {sampling_distance(true_features):.3g}"
        message += " apart by sampling alone, where endless ones would be 0 apart."
    warnings.warn(f"{message} Give more than {dimension} of each, or report both numbers.", stacklevel=3)
