"""Loads rows from disk or the Hub, checks their format at the door, and opens the images in them safely.

A row is a pair `{image, text}`, a document `{content: [{"type": "text" | "image", ...}]}` or a conversation
`{messages: [{"role", "content"}]}`. This file knows columns, types and image files. It does not know captions beyond
their column names, nor tokens, tensors or models.
"""

import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError


Rows: TypeAlias = Dataset | IterableDataset
TEXT_COLUMNS = ("text", "description", "keywords", "categories")
FACT_COLUMNS = ("has_people", "aesthetic_score")
ROW_FORMATS = {"pair": "image", "document": "content", "conversation": "messages"}
ROLES = ("system", "user", "assistant", "tool")
FILE_FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".json": "json", ".csv": "csv"}


class ImageError(ValueError):
    """An image that cannot be used; the message names the field and the reason."""


class RowError(ValueError):
    """A row that breaks its format; the message names the row number and the column."""


def load_rows(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    text_column: str | None = None,
    description_column: str | None = None,
    keywords_column: str | None = None,
    categories_column: str | None = None,
    has_people_column: str | None = None,
    aesthetic_score_column: str | None = None,
    streaming: bool = False,
) -> Rows:
    """Loads captioned images and gives their columns the standard names of a pair row; documents come as they are.

    A column that is not named here is looked for under its standard name (`text`, `description`, `keywords`,
    `categories`, `has_people`, `aesthetic_score`). Naming a description or keywords column, and no text column, puts
    an existing `text` column aside, because a finished text wins over its parts. A dot reaches into a struct, as in
    `json.caption` for a webdataset. Other columns stay. Images stay undecoded, as `{"bytes", "path"}` for
    [`open_image`], so a damaged file harms nobody while loading.

    Args:
        source (`str` or `os.PathLike`): An image folder with `metadata.csv` or `metadata.jsonl`, a folder made with
            `save_to_disk`, parquet or tar (webdataset) files (a path or a glob), or the id of a Hub dataset.
        split (`str`): Split to load, in the notation of `datasets` (`"train[:1000]"`). Files named by a path or glob
            are taken as that split.
        config_name (`str`, *optional*): Configuration (subset) of a Hub dataset.
        image_column (`str`): Column with the images.
        text_column (`str`, *optional*): Column with finished captions.
        description_column (`str`, *optional*): Column with descriptions, to be joined with keywords and categories.
        keywords_column (`str`, *optional*): Column with keywords: lists of strings, or strings with commas.
        categories_column (`str`, *optional*): Column with categories, in the same two forms.
        has_people_column (`str`, *optional*): Column of bools: the picture shows people.
        aesthetic_score_column (`str`, *optional*): Column of numbers.
        streaming (`bool`): Whether to read rows one after the other instead of by number.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` when streaming.

    Raises:
        ValueError: If the source is missing, a named column is not there, or a column has the wrong type.
    """
    named = {
        "text": text_column,
        "description": description_column,
        "keywords": keywords_column,
        "categories": categories_column,
        "has_people": has_people_column,
        "aesthetic_score": aesthetic_score_column,
    }
    rows = open_source(source, split=split, config_name=config_name, streaming=streaming)
    if "content" in rows.column_names and not any([*named.values(), image_column in rows.column_names]):
        return check_columns(rows, "document")
    if text_column is None and (description_column or keywords_column) and "text" in rows.column_names:
        rows = rows.remove_columns("text")
    rows = _rename(rows, "image", image_column)
    for standard, column in named.items():
        if column is not None:
            rows = _rename(rows, standard, column)
    return check_columns(rows, "pair")


def open_source(
    source: str | os.PathLike, *, split: str = "train", config_name: str | None = None, streaming: bool = False
) -> Rows:
    """Opens a source of rows of any format under the column names it has, see [`load_rows`] for the sources.

    Raises:
        ValueError: If its files cannot be read as what their names say, hold no rows or not that split, or have no
            configurations and one is named.
    """
    path = Path(source)
    is_saved = path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists())
    if config_name is not None and (is_saved or path.suffix in FILE_FORMATS):
        raise ValueError(f"`config_name`={config_name!r}: {str(source)!r} has no configurations. Leave it out.")
    if is_saved:
        return _open_saved(path, split, streaming)
    if path.is_dir():
        rows = _read_files(source, str(path), name=config_name, split=split, streaming=streaming)
    elif path.suffix in FILE_FORMATS:
        name = re.match(r"\w+", split)
        if name is None:
            raise ValueError(f"`split`={split!r} must begin with a name, such as 'train' or 'train[:100]'.")
        if not any(mark in str(source) for mark in ("*", "?", "[", "://")) and not path.exists():
            raise ValueError(f"`source`={str(source)!r} is no file here. Give a path, a glob, a folder or a Hub id.")
        files = {name[0]: str(source)}
        rows = _read_files(source, FILE_FORMATS[path.suffix], data_files=files, split=split, streaming=streaming)
    else:
        rows = load_dataset(str(source), config_name, split=split, streaming=streaming)
    return _with_known_columns(rows)


def check_columns(rows: Rows, row_format: str) -> Rows:
    """Checks that the columns of a row format are there with the right types, and puts off decoding of images.

    Args:
        rows (`Dataset` or `IterableDataset`): Rows under the standard column names.
        row_format (`str`): `"pair"`, `"document"` or `"conversation"`.

    Returns:
        The same rows; images of pair and document rows are cast to undecoded bytes and path.

    Raises:
        ValueError: If a column is missing (the message lists those there are) or has the wrong type.
    """
    _check_format_name(row_format)
    rows = _with_known_columns(rows)
    needed = ROW_FORMATS[row_format]
    if needed not in rows.column_names:
        raise ValueError(f"A {row_format} row needs the column `{needed}`. Columns here: {rows.column_names}.")
    if row_format == "document":
        undecoded = _undecoded(rows.features["content"])
        return rows if rows.features["content"] == undecoded else rows.cast_column("content", undecoded)
    if row_format != "pair":
        return rows
    if not {"text", "description", "keywords"} & set(rows.column_names):
        raise ValueError(
            "A pair row needs a column `text`, `description` or `keywords`; name yours with `text_column`, "
            f"`description_column` or `keywords_column`. Columns here: {rows.column_names}."
        )
    for column, feature in rows.features.items():
        _check_type(column, feature)
    if rows.features["image"] == Image(decode=False):
        return rows
    try:
        return rows.cast_column("image", Image(decode=False))
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(
            f"Column `image` holds {rows.features['image']}; it must hold images, bytes or paths: {error}"
        ) from error


def check_row(row: Mapping[str, Any], number: int, row_format: str) -> None:
    """Checks one row's values.

    Args:
        row (`Mapping`): The row.
        number (`int`): Its number, for the message.
        row_format (`str`): `"pair"`, `"document"` or `"conversation"`.

    Raises:
        RowError: If a value is missing or of the wrong type. Images are looked at by [`open_image`] only.
    """
    _check_format_name(row_format)
    column = ROW_FORMATS[row_format]
    if not isinstance(row, Mapping):
        raise RowError(f"Row {number}: {type(row).__name__}, must be a mapping with the column `{column}`.")
    if row.get(column) is None:
        raise RowError(f"Row {number}, column `{column}`: nothing there. A {row_format} row needs it.")
    if row_format == "pair":
        _check_pair(row, number)
    elif row_format == "document":
        _check_content(row["content"], number, "content")
    else:
        _check_messages(row["messages"], number)


def check_rows(rows: Rows, row_format: str, *, num_rows: int | None = None) -> Rows:
    """Checks the columns, then the values of the first `num_rows` rows (`None`: of all), and returns the rows."""
    rows = check_columns(rows, row_format)
    for number, row in enumerate(rows.take(num_rows) if num_rows is not None else rows):
        check_row(row, number, row_format)
    return rows


def open_image(value: Any, field: str = "image") -> PILImage.Image:  # noqa: ANN401
    """Opens one image as RGB, whatever it is stored as, or says why it cannot be used.

    Transparent pictures are laid on white, 16-bit grey is scaled to 8 bits, the first frame of an animation is taken,
    and the EXIF orientation is applied.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike`, `np.ndarray` or `dict`): The image, its encoded bytes,
            its path or URL, `uint8` pixels `(H, W)` or `(H, W, 3 or 4)`, or `{"bytes", "path"}` of `datasets`.
        field (`str`): What to call it in an error.

    Returns:
        `PIL.Image.Image`: in mode RGB, fully read.

    Raises:
        ImageError: If the image is missing, unreadable, truncated, zero-sized, of a mode without a defined range, or
            has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times the limit; its other warnings are about harmless metadata.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            image = _open(value)
            if image.width * image.height == 0:
                raise ImageError(f"zero-sized ({image.width} x {image.height} px)")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ImageError(
            f"`{field}` is too large (PIL.Image.MAX_IMAGE_PIXELS={PILImage.MAX_IMAGE_PIXELS}): {error}"
        ) from error
    except ImageError as error:
        raise ImageError(f"`{field}` is {error}") from None
    except UnidentifiedImageError as error:  # whose own text names the buffer that was read
        raise ImageError(f"`{field}` is no picture in a format that Pillow reads, such as PNG or JPEG") from error
    except Exception as error:  # decoders raise nearly every type on damaged files
        raise ImageError(f"`{field}` is unreadable or truncated: {type(error).__name__}: {error}") from error


def center_crop_resize(image: PILImage.Image, size: int | tuple[int, int]) -> PILImage.Image:
    """Cuts the largest centred part with the wanted aspect ratio and resizes it.

    Args:
        image (`PIL.Image.Image`): The image.
        size (`int` or `tuple[int, int]`): Side in px, or `(height, width)`.

    Returns:
        `PIL.Image.Image`: of exactly that size.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return ImageOps.fit(image, (width, height), method=PILImage.Resampling.LANCZOS)


def _open(value: Any) -> PILImage.Image:  # noqa: ANN401
    """Opens without decoding, as far as the kind of value allows it."""
    if isinstance(value, PILImage.Image):
        return value
    if isinstance(value, np.ndarray):
        return PILImage.fromarray(value)
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (str, os.PathLike)):
        with fsspec.open(os.fspath(value), "rb") as file:
            value = file.read()
    if value is None:
        raise ImageError("missing")
    if len(value) == 0:
        raise ImageError("empty (0 bytes)")
    return PILImage.open(io.BytesIO(value))


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Converts any mode to RGB; what shows through is white."""
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.mode == "F":
        raise ImageError("of floats, which have no defined range. Store it with 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        image = PILImage.alpha_composite(white, image)
    return image.convert("RGB")


def _grey16_to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion clips it to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"of integers in [{values.min()}, {values.max()}], outside 16 bits")
    return PILImage.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")


def _read_files(source: str | os.PathLike, builder: str, **options: Any) -> Rows:
    """Reads files, and says which when they are damaged or empty, whatever the reader of their format raises."""
    try:
        return load_dataset(builder, **options)
    except (FileNotFoundError, ConnectionError):  # which say what is not there
        raise
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"`source`={str(source)!r} cannot be read ({type(reason).__name__}: {reason}). Its files must be whole, "
            "hold rows, and be of the format that their names end in."
        ) from error


def _open_saved(path: Path, split: str, streaming: bool) -> Rows:
    """Opens splits of a folder made with `save_to_disk`; rows saved without are those of "train"."""
    try:
        saved = load_from_disk(str(path))
    except (IndexError, KeyError, TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}): it holds no rows, or not what "
            "`save_to_disk` wrote. Save the rows again."
        ) from error
    splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    try:
        named = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"`split`={split!r} is not in {path}. Splits there: {list(splits)}. ({error})") from error
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in named]
    rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return rows.to_iterable_dataset() if streaming else rows


def _with_known_columns(rows: Rows) -> Rows:
    """Makes a stream know its columns, from its first row if need be."""
    if rows.features is not None:
        return rows
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("The stream has no rows.")
    image_like = {name for name, value in first.items() if isinstance(value, PILImage.Image)}
    plain = {name: [value] for name, value in first.items() if name not in image_like}
    features = Dataset.from_dict(plain).features if plain else Features()
    return rows.cast(Features({**features, **{name: Image() for name in image_like}}))


def _rename(rows: Rows, standard: str, column: str) -> Rows:
    """Gives `column` (dots reach into structs) its standard name; a column that has the name already gives way."""
    top, *inner = column.split(".") if column not in rows.column_names else [column]
    if top not in rows.column_names:
        raise ValueError(f"`{standard}_column`={column!r} is not there. Columns here: {rows.column_names}.")
    if column == standard:
        return rows
    if inner:
        feature = rows.features[top]
        for key in inner:
            if not isinstance(feature, Mapping) or key not in feature:
                raise ValueError(f"`{standard}_column`={column!r}: no {key!r} in {feature}.")
            feature = feature[key]
        return _pull_out(rows, top, inner, standard, feature)
    if standard in rows.column_names:
        rows = rows.remove_columns(standard)
    return rows.rename_column(column, standard)


def _pull_out(rows: Rows, top: str, inner: list[str], standard: str, feature: Any) -> Rows:  # noqa: ANN401
    """Copies a value inside a struct column into a column of its own, without rewriting the images."""

    def pull(struct: Any) -> dict[str, Any]:  # noqa: ANN401
        for key in inner:
            struct = None if struct is None else struct[key]
        return {standard: struct}

    rest = rows.remove_columns(standard) if standard in rows.column_names and standard != top else rows
    if isinstance(rest, IterableDataset):
        return rest.map(pull, input_columns=top, features=Features({**rest.features, standard: feature}))
    column = rest.select_columns(top).map(
        pull, input_columns=top, remove_columns=top, features=Features({standard: feature})
    )
    return concatenate_datasets([rest, column], axis=1)


def _undecoded(feature: Any) -> Any:  # noqa: ANN401
    """Puts off the decoding of images anywhere inside a column's type."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, Mapping):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return feature


def _is_text(feature: Any) -> bool:  # noqa: ANN401
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _check_type(column: str, feature: Any) -> None:  # noqa: ANN401
    """Refuses a pair column of the wrong type."""
    is_text = _is_text(feature)
    is_number = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float"))
    of_type = {
        "image": isinstance(feature, (Image, Mapping))
        or is_text
        or feature in (Value("binary"), Value("large_binary")),
        "text": is_text,
        "description": is_text,
        "keywords": is_text or (isinstance(feature, List) and _is_text(feature.feature)),
        "categories": is_text or (isinstance(feature, List) and _is_text(feature.feature)),
        "has_people": isinstance(feature, Value) and feature.dtype == "bool",
        "aesthetic_score": is_number,
    }
    wanted = {"image": "images, bytes or paths", "has_people": "bools", "aesthetic_score": "numbers"}
    wanted |= {"keywords": "strings or lists of strings", "categories": "strings or lists of strings"}
    # A column of nulls has the type null: nothing there, which the row checks and filters deal with.
    if not of_type.get(column, True) and feature != Value("null"):
        raise ValueError(f"Column `{column}` holds {feature}; it must hold {wanted.get(column, 'strings')}.")


def _check_format_name(row_format: str) -> None:
    if row_format not in ROW_FORMATS:
        raise ValueError(f"`row_format`={row_format!r} must be one of {list(ROW_FORMATS)}.")


def check_texts(row: Mapping[str, Any], name: str) -> None:
    """Checks that the columns of text of a pair row, where they are there, hold text.

    Args:
        row (`Mapping`): The row.
        name (`str`): What an error calls it.

    Raises:
        RowError: If one holds something else.
    """
    for column in ("text", "description"):
        if not isinstance(row.get(column), (str, type(None))):
            raise RowError(f"{name}, column `{column}`: {type(row[column]).__name__}, must be a string.")
    for column in ("keywords", "categories"):
        value = row.get(column)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, Iterable) or not all(isinstance(word, str) for word in value):
            raise RowError(f"{name}, column `{column}`: {value!r} must be a string or a list of strings.")


def _check_pair(row: Mapping[str, Any], number: int) -> None:
    check_texts(row, f"Row {number}")
    if not any(row.get(column) for column in ("text", "description", "keywords")):
        raise RowError(f"Row {number}, column `text`: empty caption. Give `text`, `description` or `keywords`.")


def _check_content(content: Any, number: int, column: str) -> None:  # noqa: ANN401
    if not isinstance(content, list) or not content:
        raise RowError(f"Row {number}, column `{column}`: {content!r} must be a list of parts, at least one.")
    for place, part in enumerate(content):
        where = f"Row {number}, column `{column}`, part {place}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            raise RowError(f"{where}: `type`={kind!r} must be 'text' or 'image'.")
        if part.get(kind) is None:
            raise RowError(f"{where}: a part of type {kind!r} needs `{kind}`.")
        if kind == "text" and not isinstance(part["text"], str):
            raise RowError(f"{where}: `text` is {type(part['text']).__name__}, must be a string.")


def _check_messages(messages: Any, number: int) -> None:  # noqa: ANN401
    if not isinstance(messages, list) or not messages:
        raise RowError(f"Row {number}, column `messages`: {messages!r} must be a list of messages, at least one.")
    for place, message in enumerate(messages):
        column = f"messages[{place}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise RowError(f"Row {number}, column `{column}`: `role`={role!r} must be one of {ROLES}.")
        if not isinstance(message.get("content"), str):
            _check_content(message.get("content"), number, f"{column}.content")


def iterate_captions(rows: Rows) -> Iterator[str]:
    """Yields every text, description, keyword list, category list and text part of the rows, reading no image."""
    present = [column for column in ("content", *TEXT_COLUMNS) if column in rows.column_names]
    for row in rows.select_columns(present):
        for part in row.pop("content", None) or ():
            if part is not None and not isinstance(part, Mapping):
                raise RowError(f"Column `content`: {part!r} must be a part with a `type`, such as 'text' or 'image'.")
            if part and part.get("text"):
                yield part["text"]
        for value in row.values():
            if value:
                yield value if isinstance(value, str) else ", ".join(value)
