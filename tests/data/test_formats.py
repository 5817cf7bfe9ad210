import gc
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset
from PIL import Image as PILImage
from PIL import ImageFile

from hf_mm.data.formats import (
    ImageError,
    RowError,
    center_crop_resize,
    check_columns,
    check_row,
    check_rows,
    iterate_captions,
    load_rows,
    open_image,
)


def encoded(image: PILImage.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def picture(width: int = 7, height: int = 5, color: tuple[int, ...] = (200, 30, 60)) -> PILImage.Image:
    return PILImage.new("RGB", (width, height), color)


def noise(width: int, height: int) -> PILImage.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(values)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(3):
        picture(5 + number).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "caption": f"caption {number}", "tags": ["a", "b"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def tar_file(tmp_path: Path) -> Path:
    path = tmp_path / "shard-0.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            parts = {
                "png": encoded(picture(5 + number)),
                "txt": f"caption {number}".encode(),
                "json": json.dumps({"title": f"title {number}", "tags": ["a"]}).encode(),
            }
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def pair_rows() -> Dataset:
    images = [{"bytes": encoded(picture(5 + number)), "path": None} for number in range(3)]
    columns = {"photo": images, "caption": [f"caption {number}" for number in range(3)]}
    return Dataset.from_dict(columns).cast_column("photo", Image())


def widths_and_texts(rows: Dataset | IterableDataset) -> list[tuple[int, str]]:
    return [(open_image(row["image"]).width, row["text"]) for row in rows]


WANTED = [(5 + number, f"caption {number}") for number in range(3)]


@pytest.mark.parametrize("streaming", [False, True])
def test_image_folder_with_captions_loads(image_folder: Path, streaming: bool) -> None:
    rows = load_rows(image_folder, text_column="caption", keywords_column="tags", streaming=streaming)
    assert widths_and_texts(rows) == WANTED
    assert next(iter(rows))["keywords"] == ["a", "b"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves metadata.csv open
def test_image_folder_with_csv_loads(image_folder: Path) -> None:
    (image_folder / "metadata.jsonl").unlink()
    lines = ["file_name,caption", *(f"{number}.png,caption {number}" for number in range(3))]
    (image_folder / "metadata.csv").write_text("\n".join(lines))
    assert widths_and_texts(load_rows(image_folder, text_column="caption")) == WANTED
    gc.collect()  # so that the unclosed file is noticed here, where it is ignored


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_glob_loads(tmp_path: Path, streaming: bool) -> None:
    for number in range(3):
        pair_rows().select([number]).to_parquet(tmp_path / f"part-{number}.parquet")
    rows = load_rows(
        tmp_path / "part-*.parquet", image_column="photo", text_column="caption", streaming=streaming, split="train"
    )
    assert widths_and_texts(rows) == WANTED


def test_split_of_a_file_may_be_sliced(tmp_path: Path) -> None:
    pair_rows().to_parquet(tmp_path / "a.parquet")
    rows = load_rows(tmp_path / "a.parquet", image_column="photo", text_column="caption", split="validation[1:]")
    assert widths_and_texts(rows) == WANTED[1:]


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_loads_and_dots_reach_into_json(tar_file: Path, streaming: bool) -> None:
    rows = load_rows(tar_file, image_column="png", text_column="txt", streaming=streaming)
    assert widths_and_texts(rows) == WANTED
    rows = load_rows(tar_file, image_column="png", description_column="json.title", keywords_column="json.tags")
    assert rows["description"][:] == [f"title {number}" for number in range(3)]
    assert rows["keywords"][0] == ["a"]
    rows = load_rows(tar_file, image_column="png", description_column="json.title", streaming=True)
    assert [row["description"] for row in rows] == [f"title {number}" for number in range(3)]
    with pytest.raises(ValueError, match=r"`text_column`='json.name': no 'name'"):
        load_rows(tar_file, image_column="png", text_column="json.name")


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_load(tmp_path: Path, streaming: bool) -> None:
    pair_rows().save_to_disk(tmp_path / "one")
    DatasetDict({"dev": pair_rows()}).save_to_disk(tmp_path / "several")
    for path, split in ((tmp_path / "one", "train"), (tmp_path / "several", "dev")):
        rows = load_rows(path, split=split, image_column="photo", text_column="caption", streaming=streaming)
        assert widths_and_texts(rows) == WANTED
    with pytest.raises(ValueError, match=r"`split`='train' is not in .*\['dev'\]"):
        load_rows(tmp_path / "several")
    with pytest.raises(ValueError, match=r"`split`='validation' is not in .*\['train'\]"):
        load_rows(tmp_path / "one", split="validation")
    with pytest.raises(ValueError, match="`config_name`='large'.* has no configurations"):
        load_rows(tmp_path / "one", config_name="large")
    columns = {"image_column": "photo", "text_column": "caption", "streaming": streaming}
    assert widths_and_texts(load_rows(tmp_path / "one", split="train[1:]", **columns)) == WANTED[1:]
    assert widths_and_texts(load_rows(tmp_path / "several", split="dev[:1]+dev", **columns)) == [WANTED[0], *WANTED]


@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_column_names_are_refused_with_those_there_are(image_folder: Path, streaming: bool) -> None:
    with pytest.raises(
        ValueError, match=r"`text_column`='title' is not there. Columns here: \['image', 'caption', 't"
    ):
        load_rows(image_folder, text_column="title", streaming=streaming)
    with pytest.raises(ValueError, match=r"`image_column`='photo' is not there.*'caption'"):
        load_rows(image_folder, image_column="photo", text_column="caption", streaming=streaming)
    with pytest.raises(ValueError, match=r"needs a column `text`, `description` or `keywords`.*'caption'"):
        load_rows(image_folder, streaming=streaming)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`source`='.*none.parquet' is no file"):
        load_rows(tmp_path / "none.parquet")


def test_columns_of_wrong_type_are_refused() -> None:
    images = [{"bytes": encoded(picture()), "path": None}]
    wrong = {"text": [3], "keywords": [[3]], "has_people": ["yes"], "aesthetic_score": ["high"]}
    for column, values in wrong.items():
        columns = {"image": images, "text": ["a"], column: values}
        with pytest.raises(ValueError, match=rf"Column `{column}` holds"):
            check_rows(Dataset.from_dict(columns), "pair")


def test_naming_parts_puts_an_existing_text_column_aside(tmp_path: Path) -> None:
    rows = pair_rows().rename_column("photo", "image").add_column("text", ["old"] * 3)
    rows.to_parquet(tmp_path / "a.parquet")
    loaded = load_rows(tmp_path / "a.parquet", description_column="caption")
    assert "text" not in loaded.column_names
    assert loaded["description"][0] == "caption 0"
    assert load_rows(tmp_path / "a.parquet", text_column="caption")["text"][0] == "caption 0"


def test_a_damaged_file_does_no_harm_before_it_is_opened(image_folder: Path) -> None:
    (image_folder / "1.png").write_bytes(b"")
    rows = load_rows(image_folder, text_column="caption")
    assert [row["text"] for row in rows] == [f"caption {number}" for number in range(3)]
    with pytest.raises(ImageError, match=r"`image` is empty \(0 bytes\)"):
        open_image(rows[1]["image"])


def test_captions_are_read_without_images(image_folder: Path) -> None:
    rows = load_rows(image_folder, text_column="caption", keywords_column="tags")
    for path in image_folder.glob("*.png"):
        path.unlink()
    assert list(iterate_captions(rows))[:2] == ["caption 0", "a, b"]


def test_every_way_to_give_an_image_opens_the_same(tmp_path: Path) -> None:
    image = noise(7, 5)
    path = tmp_path / "a.png"
    image.save(path)
    content = path.read_bytes()
    values = [image, content, path, str(path), f"file://{path}", np.asarray(image)]
    values += [{"bytes": content, "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    for value in values:
        opened = open_image(value)
        assert opened.mode == "RGB" and np.array_equal(opened, image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    clear = PILImage.new("RGBA", (7, 5), (10, 20, 30, 0))
    image = clear.convert("P") if mode in ("PA", "P") else clear.convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    elif mode == "PA":
        image = clear.quantize(4).convert("PA")
        image.putalpha(0)
    assert open_image(image).getpixel((3, 2)) == (255, 255, 255)


def test_half_transparent_black_becomes_grey() -> None:
    shade = open_image(encoded(PILImage.new("RGBA", (7, 5), (0, 0, 0, 128)))).getpixel((0, 0))
    assert shade == (127, 127, 127)


def test_other_modes_become_rgb() -> None:
    red = picture(color=(255, 0, 0))
    assert open_image(encoded(red.convert("CMYK"), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(encoded(red.quantize(2))).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(PILImage.new("1", (7, 5), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    opened = np.asarray(open_image(encoded(PILImage.fromarray(values))))
    assert opened[0, :, 0].tolist() == [0, 100, 255]


def test_first_frame_of_an_animation_is_taken() -> None:
    frames = [picture(color=(255, 0, 0)), picture(color=(0, 0, 255))]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(content).getpixel((0, 0)) == (255, 0, 0)


def test_orientation_is_applied() -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    assert open_image(encoded(picture(7, 5), "JPEG", exif=exif)).size == (5, 7)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing"),
        ({"bytes": None, "path": None}, "missing"),
        (b"", "empty"),
        (b"no image at all", "no picture in a format that Pillow reads"),
        ("nowhere.png", "unreadable or truncated: FileNotFoundError"),
        (encoded(noise(37, 31))[:900], "unreadable or truncated"),
        (encoded(noise(37, 31), "JPEG")[:-200], "unreadable or truncated"),
        (PILImage.new("RGB", (0, 5)), "zero-sized"),
        (PILImage.new("F", (7, 5)), "of floats"),
        (3.5, "unreadable"),
    ],
)
def test_unusable_images_are_refused_with_field_and_reason(value: object, reason: str) -> None:
    with pytest.raises(ImageError, match=rf"`picture` is {reason}"):
        open_image(value, field="picture")


@pytest.mark.parametrize("limit", [40, 20, 3])  # a picture of 35 pixels: allowed; Pillow warns; Pillow raises
def test_decompression_bombs_are_refused_before_they_are_decoded(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(picture(7, 5))
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", limit)
    if limit == 40:
        assert open_image(content).size == (7, 5)
        return
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=rf"`image` is too large \(PIL.Image.MAX_IMAGE_PIXELS={limit}\)"):
        open_image(content)


def test_crop_keeps_the_centre_and_gives_height_by_width() -> None:
    wide = PILImage.new("RGB", (31, 10), (255, 0, 0))
    wide.paste((0, 0, 255), (11, 0, 20, 10))
    assert center_crop_resize(wide, (13, 11)).size == (11, 13)
    square = np.asarray(center_crop_resize(wide, 7))
    assert square.shape == (7, 7, 3)
    assert square[3, 3].tolist() == [0, 0, 255]


DOCUMENT = {"content": [{"type": "text", "text": "a"}, {"type": "image", "image": picture()}]}
CONVERSATION = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": DOCUMENT["content"]}]}


@pytest.mark.parametrize(("row_format", "row"), [("document", DOCUMENT), ("conversation", CONVERSATION)])
def test_good_documents_and_conversations_pass(row_format: str, row: dict) -> None:
    check_row(row, 0, row_format)


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        ("pair", {"text": "a"}, "column `image`: nothing there"),
        ("pair", {"image": b"", "text": ""}, "column `text`: empty caption"),
        ("pair", {"image": b"", "text": 3}, "column `text`: int"),
        ("pair", {"image": b"", "keywords": [3]}, "column `keywords`"),
        ("document", {"content": []}, "column `content`.*at least one"),
        ("document", {"content": [{"type": "video"}]}, "column `content`, part 0: `type`='video'"),
        (
            "document",
            {"content": [{"type": "text", "text": None}]},
            "column `content`, part 0: a part of type 'text' needs",
        ),
        ("conversation", {"messages": None}, "column `messages`: nothing there"),
        ("conversation", {"messages": [{"role": "me", "content": "a"}]}, r"column `messages\[0\]`: `role`='me'"),
        ("conversation", {"messages": [{"role": "user", "content": None}]}, r"column `messages\[0\].content`"),
    ],
)
def test_bad_rows_are_refused_with_number_and_column(row_format: str, row: dict, message: str) -> None:
    with pytest.raises(RowError, match=f"Row 17, {message}"):
        check_row(row, 17, row_format)


def test_rows_are_checked_as_far_as_asked() -> None:
    good, bad = [{"role": "user", "content": "a"}], [{"role": "nobody", "content": "a"}]
    rows = Dataset.from_dict({"messages": [good, good, bad]})
    check_rows(rows, "conversation", num_rows=2)
    with pytest.raises(RowError, match="Row 2, "):
        check_rows(rows, "conversation")
    with pytest.raises(ValueError, match=r"needs the column `content`. Columns here: \['messages'\]"):
        check_rows(rows, "document")


@pytest.mark.parametrize(
    ("name", "data"), [("a.parquet", b"PAR1 no more"), ("a.jsonl", b""), ("a.csv", b'image,text\n"a')]
)
def test_a_damaged_or_empty_file_is_refused_by_name(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        load_rows(tmp_path / name)


def test_a_saved_dataset_without_rows_is_refused_by_its_folder(tmp_path: Path) -> None:
    Dataset.from_dict({"image": [], "text": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="none.*no rows|none.*nothing|`text`|`image`"):
        load_rows(tmp_path / "none")


@pytest.mark.parametrize("row_format", ["pair", "document", "conversation"])
def test_what_is_no_row_at_all_is_refused(row_format: str) -> None:
    with pytest.raises(RowError, match="Row 3: NoneType, must be a mapping"):
        check_row(None, 3, row_format)
    with pytest.raises(RowError, match="Row 3, column `keywords`: 7 must be"):
        check_row({"image": b"", "text": "a", "keywords": 7}, 3, "pair")


def test_pictures_of_another_type_are_refused_by_their_column():
    rows = Dataset.from_list([{"image": {"bytes": 3, "path": None}, "text": "a"}])
    with pytest.raises(ValueError, match="`image` holds .*images, bytes or paths"):
        check_columns(rows, "pair")


def test_documents_of_strings_are_refused_where_their_captions_are_read():
    rows = Dataset.from_list([{"content": ["a red star"]}])
    with pytest.raises(RowError, match="`content`: 'a red star' must be a part"):
        list(iterate_captions(rows))
