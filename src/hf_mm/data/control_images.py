"""Computes the control pictures of structure-guided generation: edges, depth, normals, segmentation, pose, scribbles.

Edges are scikit-image's; depth, segmentation and pose come from models of transformers, named by their Hub id. Knows
rows with a column `image`, and no task.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, concatenate_datasets
from PIL import Image as PILImage
from PIL import ImageDraw
from skimage import feature, filters, morphology
from transformers import AutoImageProcessor, VitPoseForPoseEstimation, pipeline

from .formats import ImageError, RowError, open_image


# Axes: H height, W width.
CONTROL_KINDS = ("canny", "hed", "segmentation", "depth", "normals", "pose", "scribble")
SOBEL = "sobel"

_MODELS = {
    "depth": "a model for depth-estimation, such as 'Intel/dpt-large' or 'depth-anything/Depth-Anything-V2-Small-hf'",
    "normals": "a model for depth-estimation, such as 'Intel/dpt-large', of whose depth the normals are taken",
    "segmentation": "a model for image-segmentation, such as 'nvidia/segformer-b0-finetuned-ade-512-512'",
    "pose": "a VitPose model, such as 'usyd-community/vitpose-base-simple'",
    "hed": f"{SOBEL!r}, soft edges by the Sobel filter in its stead: transformers has no HED model. Or bring pictures "
    "made elsewhere in a column `control_image`",
}
_SCRIBBLE_SIGMA = 2.0  # in units of `sigma`: only the strong outlines
_SCRIBBLE_SHARE = 1 / 96  # half the thickness of a stroke, as a share of the shorter side
_RELIEF = 1 / 8  # height of the whole range of depths, as a share of the shorter side: how steep normals look
_PALETTE_SIZE = 256
_MIN_KEYPOINT_SCORE = 0.3
_MIN_PERSON_SCORE = 0.5
# The 17 keypoints of COCO: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left before right.
_LIMBS = ((5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16), (5, 6), (11, 12), (5, 11), (6, 12),
          (0, 1), (0, 2), (1, 3), (2, 4))  # fmt: skip


def add_control_images(
    rows: Dataset,
    kind: str,
    *,
    model_name: str | None = None,
    detector_name: str | None = None,
    sigma: float = 1.0,
    thresholds: tuple[float, float] = (0.1, 0.2),
    device: str = "cpu",
    num_proc: int | None = None,
) -> Dataset:
    """Computes the column `control_image` from `image`; done once, for `datasets` caches what it maps.

    What is cached depends on the name of a model, not on its weights: give another folder to other weights.

    Args:
        rows (`datasets.Dataset`): With a column `image`.
        kind (`str`): One of `CONTROL_KINDS`. `"canny"`: white edges on black. `"scribble"`: the strong ones, thick.
            `"hed"`: soft edges. `"depth"`: grey, stretched over the whole range, bright where the model's number is
            high (near, in models of relative depth). `"normals"`: x, y and z of the surface as red, green and blue.
            `"segmentation"`: a fixed colour for each number of a class. `"pose"`: skeletons of 17 keypoints.
        model_name (`str`, *optional*): Hub id or folder; not for `"canny"` and `"scribble"`. For `"hed"` only
            `"sobel"`, a stand-in of scikit-image, because transformers has no HED.
        detector_name (`str`, *optional*): For `"pose"`, a model for object-detection that finds the persons; none:
            the whole picture is taken for one person.
        sigma (`float`): Blur before edges are looked for, in pixels.
        thresholds (`tuple[float, float]`): Of canny, low and high, in `[0, 1]`.
        device (`str`): Of the model.
        num_proc (`int`, *optional*): Processes; one where a model runs on a GPU.

    Returns:
        `datasets.Dataset`: The rows with `control_image`, undecoded PNG of the picture's size.

    Raises:
        ValueError: If the kind is unknown, a model is missing, or one is given that is not needed.
        RowError: If a picture cannot be read.
    """
    _check(kind, model_name, detector_name, rows)
    compute = _Compute(kind, model_name, detector_name, sigma, thresholds, device)
    pictures = rows.select_columns("image").cast_column("image", Image(decode=False))
    control = pictures.map(
        compute,
        input_columns="image",
        with_indices=True,
        remove_columns="image",
        features=Features({"control_image": Image()}),
        num_proc=num_proc,
        desc=f"Computing {kind}",
    ).cast_column("control_image", Image(decode=False))
    rest = rows.remove_columns("control_image") if "control_image" in rows.column_names else rows
    return concatenate_datasets([rest, control], axis=1)


def _check(kind: str, model_name: str | None, detector_name: str | None, rows: Dataset) -> None:
    """Refuses what cannot be computed."""
    if kind not in CONTROL_KINDS:
        raise ValueError(f"`kind`={kind!r} must be one of {CONTROL_KINDS}.")
    if "image" not in rows.column_names:
        raise ValueError(f"Control pictures need the column `image`. Columns here: {rows.column_names}.")
    if kind in _MODELS and model_name is None:
        raise ValueError(f"`model_name` is missing: {kind!r} is computed by {_MODELS[kind]}.")
    if kind == "hed" and model_name != SOBEL:
        raise ValueError(f"`model_name`={model_name!r} cannot compute 'hed'; it must be {_MODELS['hed']}.")
    if kind not in _MODELS and model_name is not None:
        raise ValueError(f"`model_name`={model_name!r}: {kind!r} is computed by scikit-image, without a model.")
    if detector_name is not None and kind != "pose":
        raise ValueError(f"`detector_name`={detector_name!r} finds persons for 'pose'; {kind!r} needs none.")


@dataclass(frozen=True)
class _Compute:
    """Computes one control picture. Holds names and numbers only, so that `datasets` knows it again."""

    kind: str
    model_name: str | None
    detector_name: str | None
    sigma: float
    thresholds: tuple[float, float]
    device: str

    def __call__(self, value: Any, number: int) -> dict[str, PILImage.Image]:
        try:
            image = open_image(value)
        except ImageError as error:
            raise RowError(f"Row {number}, column `image`: {error}.") from error
        drawn = self.draw(image)
        return {"control_image": PILImage.fromarray(drawn).convert("RGB")}

    def draw(self, image: PILImage.Image) -> np.ndarray:
        """Returns the picture of this kind, uint8, (H, W) or (H, W, 3)."""
        if self.kind == "canny":
            return canny_edges(image, self.sigma, self.thresholds)
        if self.kind == "scribble":
            return scribble(image, self.sigma * _SCRIBBLE_SIGMA, self.thresholds)
        if self.kind == "hed":
            return soft_edges(image, self.sigma)
        assert self.model_name is not None
        if self.kind == "segmentation":
            return _segment(image, _load("image-segmentation", self.model_name, self.device))
        if self.kind == "pose":
            return _draw_poses(image, self.model_name, self.detector_name, self.device)
        depth = _estimate_depth(image, _load("depth-estimation", self.model_name, self.device))
        return normals_of(depth) if self.kind == "normals" else np.round(depth * 255).astype(np.uint8)


def canny_edges(image: PILImage.Image, sigma: float = 1.0, thresholds: tuple[float, float] = (0.1, 0.2)) -> np.ndarray:
    """Draws edges of one pixel, uint8 (H, W), 255 on 0."""
    low, high = thresholds
    return _find_edges(image, sigma, low, high).astype(np.uint8) * 255


def _find_edges(image: PILImage.Image, sigma: float, low: float, high: float) -> np.ndarray:
    """Finds edges in each colour, (H, W) bool: two colours of one grey have an edge too."""
    channels = np.asarray(image, dtype=np.float64) / 255  # (H, W, 3)
    found = [
        feature.canny(channels[:, :, number], sigma, low, high, mode="nearest") for number in range(channels.shape[2])
    ]
    return np.any(found, axis=0)


def scribble(image: PILImage.Image, sigma: float = 2.0, thresholds: tuple[float, float] = (0.1, 0.2)) -> np.ndarray:
    """Draws the strong edges with a thick stroke, uint8 (H, W), 255 on 0."""
    edges = _find_edges(image, sigma, *thresholds)
    radius = max(1, round(min(image.size) * _SCRIBBLE_SHARE))
    return morphology.dilation(edges, morphology.disk(radius)).astype(np.uint8) * 255


def soft_edges(image: PILImage.Image, sigma: float = 1.0) -> np.ndarray:
    """Draws the strength of edges, uint8 (H, W), the strongest 255."""
    channels = np.asarray(image, dtype=np.float64) / 255
    blurred = filters.gaussian(channels, sigma, channel_axis=2)
    strength = np.max([filters.sobel(blurred[:, :, number]) for number in range(3)], axis=0)
    return np.round(255 * strength / max(strength.max(), 1 / 255)).astype(np.uint8)


def normals_of(depth: np.ndarray) -> np.ndarray:
    """Draws the normals of a relief.

    Args:
        depth (`np.ndarray` of shape `(height, width)`): Height of the surface, nearer is higher, in `[0, 1]`.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: uint8, x to the right, y upwards and z to the viewer, 0 at 127.5.
    """
    relief = depth * _RELIEF * min(depth.shape)
    down, right = np.gradient(relief)
    normals = np.stack([-right, down, np.ones_like(relief)], axis=2)  # (H, W, 3)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    return np.round((normals + 1) * 127.5).astype(np.uint8)


@functools.cache
def _load(task: str, model_name: str, device: str) -> Callable:
    """Loads a model once in each process."""
    return pipeline(task, model=model_name, device=device)


def _estimate_depth(image: PILImage.Image, estimate: Callable) -> np.ndarray:
    """Returns the depth of each pixel stretched over [0, 1], (H, W); 0 everywhere if it is flat."""
    depth = estimate(image)["predicted_depth"].float().cpu()
    depth = torch.nn.functional.interpolate(
        depth.reshape(1, 1, *depth.shape[-2:]), size=(image.height, image.width), mode="bilinear"
    )[0, 0].numpy()
    span = depth.max() - depth.min()
    return (depth - depth.min()) / span if span > 0 else np.zeros_like(depth)


def _segment(image: PILImage.Image, segment: Callable) -> np.ndarray:
    """Paints each segment in the colour of its class, (H, W, 3); what belongs to none is black."""
    palette = np.random.default_rng(0).integers(32, 256, (_PALETTE_SIZE, 3), dtype=np.uint8)
    label_ids = segment.model.config.label2id  # type: ignore[attr-defined]
    painted = np.zeros((image.height, image.width, 3), dtype=np.uint8)
    for part in segment(image):
        painted[np.asarray(part["mask"]) > 127] = palette[label_ids[part["label"]] % _PALETTE_SIZE]
    return painted


def _draw_poses(image: PILImage.Image, model_name: str, detector_name: str | None, device: str) -> np.ndarray:
    """Draws the skeleton of each person, (H, W, 3), on black."""
    boxes = [[0.0, 0.0, float(image.width), float(image.height)]]
    if detector_name is not None:
        boxes = _find_persons(image, _load("object-detection", detector_name, device))
    canvas = PILImage.new("RGB", image.size)
    if not boxes:
        return np.asarray(canvas)
    processor, model = _load_pose(model_name, device)
    inputs = processor(image, boxes=[boxes], return_tensors="pt").to(device)
    if model.config.backbone_config.num_experts > 1:  # of several heads the first is the one for persons
        inputs["dataset_index"] = torch.zeros(len(boxes), dtype=torch.long, device=device)
    with torch.no_grad():
        outputs = model(**inputs)
    pen = ImageDraw.Draw(canvas)
    for person in processor.post_process_pose_estimation(outputs, boxes=[boxes], threshold=_MIN_KEYPOINT_SCORE)[0]:
        points = dict(zip(person["labels"].tolist(), map(tuple, person["keypoints"].tolist()), strict=True))
        _draw_skeleton(pen, points, max(1, min(image.size) // 64))
    return np.asarray(canvas)


def _draw_skeleton(pen: ImageDraw.ImageDraw, points: dict[int, tuple[float, float]], width: int) -> None:
    """Draws the limbs whose both ends were found, each in its colour."""
    for number, (start, stop) in enumerate(_LIMBS):
        if start in points and stop in points:
            pen.line([points[start], points[stop]], fill=f"hsv({360 * number // len(_LIMBS)},100%,100%)", width=width)
    for x, y in points.values():
        pen.ellipse([x - width, y - width, x + width, y + width], fill="white")


def _find_persons(image: PILImage.Image, detect: Callable) -> list[list[float]]:
    """Returns the boxes of persons as corner and size, which is what VitPose takes."""
    found = [item["box"] for item in detect(image, threshold=_MIN_PERSON_SCORE) if item["label"] == "person"]
    return [[b["xmin"], b["ymin"], b["xmax"] - b["xmin"], b["ymax"] - b["ymin"]] for b in found]


@functools.cache
def _load_pose(model_name: str, device: str) -> tuple[Any, Any]:
    """Loads a VitPose model and its processor once in each process."""
    model = VitPoseForPoseEstimation.from_pretrained(model_name).to(device).eval()
    return AutoImageProcessor.from_pretrained(model_name), model
