import io
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageDraw
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from hf_mm.data import control_images
from hf_mm.data.control_images import add_control_images, canny_edges, normals_of, scribble, soft_edges
from hf_mm.data.formats import RowError
from hf_mm.data.tasks import load_task_rows


WIDTH, HEIGHT = 53, 41
SQUARE = (15, 10, 35, 30)


def square() -> PILImage.Image:
    image = PILImage.new("RGB", (WIDTH, HEIGHT), "white")
    ImageDraw.Draw(image).rectangle(SQUARE, fill="navy")
    return image


def rows(*images: PILImage.Image) -> Dataset:
    columns = {"image": list(images), "caption": [f"picture {number}" for number in range(len(images))]}
    return Dataset.from_dict(columns).cast_column("image", Image())


def drawn(made: Dataset, number: int = 0) -> np.ndarray:
    value = made[number]["control_image"]
    return np.asarray(PILImage.open(io.BytesIO(value["bytes"])))


def outline(radius: int) -> np.ndarray:
    """The pixels at most so far from the border of the square."""
    image = PILImage.new("L", (WIDTH, HEIGHT))
    left, top, right, bottom = SQUARE
    ImageDraw.Draw(image).rectangle((left - radius, top - radius, right + radius, bottom + radius), fill=255)
    ImageDraw.Draw(image).rectangle((left + radius, top + radius, right - radius, bottom - radius), fill=0)
    return np.asarray(image) > 0


def test_canny_finds_the_outline_and_nothing_else() -> None:
    made = add_control_images(rows(square()), "canny")
    edges = drawn(made)
    assert edges.shape == (HEIGHT, WIDTH, 3)
    assert set(np.unique(edges)) == {0, 255}
    found = edges[:, :, 0] > 0
    assert not (found & ~outline(2)).any()
    assert found.sum() > 0.8 * 4 * (SQUARE[2] - SQUARE[0])
    assert made["caption"][:] == ["picture 0"]
    assert made.features["control_image"] == Image(decode=False)


def test_colors_of_one_grey_have_an_edge() -> None:
    image = PILImage.new("RGB", (WIDTH, HEIGHT), (200, 60, 60))
    ImageDraw.Draw(image).rectangle(SQUARE, fill=(60, 131, 60))
    assert abs(int(np.asarray(image.convert("L")).max()) - int(np.asarray(image.convert("L")).min())) <= 1
    assert canny_edges(image).any()


def test_an_even_picture_has_no_edges() -> None:
    image = PILImage.new("RGB", (WIDTH, HEIGHT), "teal")
    for draw in (canny_edges, scribble, soft_edges):
        assert not draw(image).any()


def test_scribbles_are_thicker_than_edges_and_lie_on_them() -> None:
    thin, thick = canny_edges(square(), 2.0) > 0, scribble(square(), 2.0) > 0
    assert thick.sum() > 2 * thin.sum()
    assert not (thin & ~thick).any()


def test_soft_edges_are_strongest_on_the_outline_and_fade() -> None:
    edges = soft_edges(square())
    assert edges.max() == 255
    assert len(np.unique(edges)) > 5
    assert edges[outline(1)].mean() > 20 * edges[~outline(5)].mean()


def test_normals_lean_away_from_the_peak() -> None:
    rows, columns = np.mgrid[:31, :43]
    hill = np.clip(1 - np.hypot(rows - 15, columns - 21) / 14, 0, 1)
    normals = normals_of(hill)
    assert normals.shape == (31, 43, 3)
    assert tuple(normals[1, 1]) == (128, 128, 255)
    left, right, above, below = normals[15, 12], normals[15, 30], normals[6, 21], normals[24, 21]
    assert left[0] < 120 and right[0] > 135  # red: x to the right
    assert above[1] > 135 and below[1] < 120  # green: y upwards
    vectors = normals / 127.5 - 1
    assert np.allclose(np.linalg.norm(vectors, axis=2), 1, atol=0.02)


def test_what_was_computed_is_not_computed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows(square(), square()).save_to_disk(str(tmp_path / "rows"))
    calls = []
    monkeypatch.setattr(control_images, "open_image", lambda value: calls.append(1) or square())
    first = add_control_images(Dataset.load_from_disk(str(tmp_path / "rows")), "canny")
    assert len(calls) == 2
    again = add_control_images(Dataset.load_from_disk(str(tmp_path / "rows")), "canny")
    assert len(calls) == 2
    assert (drawn(first) == drawn(again)).all()
    add_control_images(Dataset.load_from_disk(str(tmp_path / "rows")), "canny", sigma=2.0)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("kind", "options", "fault"),
    [
        ("lines", {}, "`kind`='lines' must be one of"),
        ("depth", {}, "`model_name` is missing: 'depth' is computed by a model for depth-estimation"),
        ("normals", {}, "of whose depth"),
        ("segmentation", {}, "segformer"),
        ("pose", {}, "VitPose"),
        ("hed", {}, "transformers has no HED model"),
        ("hed", {"model_name": "some/model"}, "cannot compute 'hed'"),
        ("canny", {"model_name": "some/model"}, "without a model"),
        ("depth", {"model_name": "m", "detector_name": "d"}, "finds persons"),
    ],
)
def test_what_cannot_be_computed_is_refused(kind: str, options: dict, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        add_control_images(rows(square()), kind, **options)


def test_a_damaged_picture_is_named() -> None:
    damaged = Dataset.from_dict({"image": [{"bytes": b"no", "path": None}]}).cast_column("image", Image(decode=False))
    with pytest.raises(RowError, match="Row 0, column `image`"):
        add_control_images(damaged, "canny")
    with pytest.raises(ValueError, match=r"need the column `image`. Columns here: \['caption'\]"):
        add_control_images(rows(square()).remove_columns("image"), "canny")


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = DPTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    folder = str(tmp_path_factory.mktemp("depth"))
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_depth_and_normals_come_from_a_model(depth_model: str) -> None:
    noisy = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    depth = drawn(add_control_images(rows(noisy), "depth", model_name=depth_model))
    assert depth.shape == (HEIGHT, WIDTH, 3)
    assert depth.min() == 0 and depth.max() == 255
    assert (depth[:, :, 0] == depth[:, :, 2]).all()
    normals = drawn(add_control_images(rows(noisy), "normals", model_name=depth_model))
    assert normals.shape == (HEIGHT, WIDTH, 3)
    assert (normals[:, :, 2] >= 127).all()


def test_each_class_has_its_color(tmp_path: Path) -> None:
    config = SegformerConfig(
        num_labels=3, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=4,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    noisy = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    made = drawn(add_control_images(rows(noisy), "segmentation", model_name=str(tmp_path)))
    assert made.shape == (HEIGHT, WIDTH, 3)
    palette = np.random.default_rng(0).integers(32, 256, (256, 3), dtype=np.uint8)[:3]
    assert {tuple(color) for color in made.reshape(-1, 3)} <= {tuple(color) for color in palette}


@pytest.fixture(scope="module")
def pose_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    backbone = VitPoseBackboneConfig(
        image_size=(32, 24), patch_size=(8, 8), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        out_indices=[2],
    )  # fmt: skip
    folder = str(tmp_path_factory.mktemp("pose"))
    model = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17))
    model.head.conv.bias.data.fill_(1.0)  # so that every keypoint is found somewhere
    model.save_pretrained(folder)
    VitPoseImageProcessorPil(size={"height": 32, "width": 24}).save_pretrained(folder)
    return folder


def test_poses_are_drawn_on_black(pose_model: str) -> None:
    made = drawn(add_control_images(rows(square()), "pose", model_name=pose_model))
    assert made.shape == (HEIGHT, WIDTH, 3)
    assert made.any()
    assert (made.reshape(-1, 3).max(axis=1) == 0).mean() > 0.3


def test_where_no_person_is_found_nothing_is_drawn(pose_model: str, tmp_path: Path) -> None:
    config = YolosConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=[32, 32],
        patch_size=8, num_detection_tokens=3, id2label={0: "cat", 1: "dog"}, use_mid_position_embeddings=False,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    made = add_control_images(rows(square()), "pose", model_name=pose_model, detector_name=str(tmp_path))
    assert not drawn(made).any()


def test_persons_alone_are_handed_on_as_corner_and_size() -> None:
    found = [("person", 3), ("dog", 33)]
    boxes = [{"label": name, "box": {"xmin": x, "ymin": 5, "xmax": x + 12, "ymax": 25}} for name, x in found]
    assert control_images._find_persons(square(), lambda image, threshold: boxes) == [[3, 5, 12, 20]]


def test_a_limb_is_drawn_between_points_that_were_found() -> None:
    canvas = PILImage.new("RGB", (WIDTH, HEIGHT))
    control_images._draw_skeleton(ImageDraw.Draw(canvas), {5: (5.0, 20.0), 7: (45.0, 20.0), 16: (25.0, 35.0)}, 1)
    pixels = np.asarray(canvas)
    assert pixels[20, 25].any()  # from the left shoulder to the left elbow
    assert pixels[35, 25].all()  # a point without a limb
    assert not pixels[27, :].any()


def test_a_structure_task_computes_its_control_pictures(tmp_path: Path) -> None:
    rows(square(), square()).save_to_disk(str(tmp_path / "rows"))
    made = load_task_rows("canny", dataset_name=tmp_path / "rows")
    assert set(made.column_names) == {"image", "caption", "control_image"}
    assert drawn(made).any()
    with pytest.raises(ValueError, match="`model_name` is missing"):
        load_task_rows("depth", dataset_name=tmp_path / "rows")
    assert load_task_rows("hed", dataset_name=tmp_path / "rows", control_model_name="sobel").num_rows == 2
