"""Where a recipe's rows come from: the embedded scenes, encoded images, or any source that `load_rows` opens.

Knows names of sources and columns; does not know what the rows are for.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, ReadInstruction, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .caption_arguments import CaptionArguments
from .caption_report import CaptionReport
from .captions import prepare_encoded, prepare_pairs
from .documents import DocumentLimit, prepare_documents, prepare_pictures
from .formats import TEXT_COLUMNS, Rows, load_rows, open_source
from .icon_scenes import SPLITS, icon_scenes_dataset, icon_scenes_stream
from .image_encoding import MANIFEST, load_encoded


EMBEDDED = "icon_scenes:"


@dataclass
class DatasetArguments:
    """The rows of a run and the names of their columns."""

    dataset_name: str = field(
        default="icon_scenes:shapes",
        metadata={
            "help": "icon_scenes:shapes or icon_scenes:icons; a folder of encode_images.py; an image folder, parquet "
            "or tar files (a glob), a folder of save_to_disk, or a Hub dataset id."
        },
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to read, e.g. train, train[:1000], train+validation."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    num_scenes: int = field(default=20_000, metadata={"help": "Icon scenes to draw; ignored for other sources."})
    scene_kinds: list[str] = field(
        default_factory=list,
        metadata={"help": "Kinds of icon scenes to draw, one as often as it is named; none: the mix of their set."},
    )
    exact_share: float = field(
        default=0.0,
        metadata={"help": "Share of icon scenes, 0 to 1, without small shifts: equal captions, equal pictures."},
    )
    image_column: str = field(default="image", metadata={"help": "Column with images."})
    text_column: str | None = field(default=None, metadata={"help": "Column with finished captions."})
    description_column: str | None = field(default=None, metadata={"help": "Column with descriptions."})
    keywords_column: str | None = field(default=None, metadata={"help": "Column with keywords."})
    categories_column: str | None = field(default=None, metadata={"help": "Column with categories."})
    has_people_column: str | None = field(
        default=None, metadata={"help": "Column that says whether people are shown."}
    )
    aesthetic_score_column: str | None = field(default=None, metadata={"help": "Column with aesthetic scores."})


def open_rows(
    arguments: DatasetArguments,
    *,
    image_size: int,
    seed: int = 0,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Rows:
    """Opens the rows that a recipe names.

    Args:
        arguments (`DatasetArguments`): Source and columns.
        image_size (`int`): Pixels at which embedded scenes are drawn; other sources keep their pictures.
        seed (`int`, defaults to 0): Of the embedded scenes.
        num_proc (`int`, *optional*): Processes that draw them.
        streaming (`bool`, defaults to `False`): Whether to read rows one after the other instead of by number.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` when streaming: pair rows, documents, or rows with encoded
        images.

    Raises:
        ValueError: If the source or a named column is not there.
    """
    name = arguments.dataset_name
    if name.startswith(EMBEDDED):
        kinds = Counter(arguments.scene_kinds) or None
        fields: dict[str, Any] = {"glyph_set": name.removeprefix(EMBEDDED), "size_px": image_size, "seed": seed}
        fields |= {"kinds": kinds, "exact_share": arguments.exact_share}
        if streaming:
            return icon_scenes_stream(arguments.num_scenes, split=arguments.dataset_split, **fields)
        return _draw_splits(arguments, num_proc=num_proc, **fields)
    if (Path(name) / MANIFEST).exists():
        rows = _open_encoded(arguments, image_size)
        return rows.with_format(None).to_iterable_dataset(num_shards=len(rows.cache_files)) if streaming else rows
    return load_rows(
        name,
        split=arguments.dataset_split,
        config_name=arguments.dataset_config_name,
        image_column=arguments.image_column,
        text_column=arguments.text_column,
        description_column=arguments.description_column,
        keywords_column=arguments.keywords_column,
        categories_column=arguments.categories_column,
        has_people_column=arguments.has_people_column,
        aesthetic_score_column=arguments.aesthetic_score_column,
        streaming=streaming,
    )


def _draw_splits(arguments: DatasetArguments, **fields: Any) -> Dataset:
    """Draws icon scenes of one split, or of several one behind the other; each has `num_scenes` to take from."""
    try:
        named = ReadInstruction.from_spec(arguments.dataset_split)
        parts = named.to_absolute(dict.fromkeys(SPLITS, arguments.num_scenes))
    except (ValueError, AssertionError) as error:
        raise ValueError(f"`dataset_split`={arguments.dataset_split!r} of icon scenes: {error}") from error
    if empty := [part.splitname for part in parts if part.to <= part.from_]:
        raise ValueError(
            f"`dataset_split`={arguments.dataset_split!r} takes nothing of the {arguments.num_scenes} scenes of "
            f"{empty[0]!r}. Raise `num_scenes`, or take others."
        )
    drawn = [icon_scenes_dataset(part.to, split=part.splitname, **fields) for part in parts]
    taken = [
        rows if part.from_ == 0 else rows.select(range(part.from_, part.to))
        for rows, part in zip(drawn, parts, strict=True)
    ]
    return taken[0] if len(taken) == 1 else concatenate_datasets(taken)


def open_pictures(arguments: DatasetArguments, *, image_size: int, seed: int = 0) -> Dataset:
    """Opens rows of which the pictures alone matter: as `open_rows` does, but captions may be missing.

    Args:
        arguments (`DatasetArguments`): Source and columns.
        image_size (`int`): Pixels at which embedded scenes are drawn; other sources keep their pictures.
        seed (`int`, defaults to 0): Of the embedded scenes.

    Returns:
        `datasets.Dataset`: pair rows, or where there are no captions, rows with nothing but `image`.

    Raises:
        ValueError: If the source or a named column is not there, or its images are encoded already.
    """
    name = arguments.dataset_name
    if (Path(name) / MANIFEST).exists():
        raise ValueError(f"`dataset_name`={name!r} holds encoded images. Name the source of the pictures themselves.")
    if name.startswith(EMBEDDED):
        return open_rows(arguments, image_size=image_size, seed=seed)
    named = (arguments.text_column, arguments.description_column, arguments.keywords_column)
    rows = open_source(name, split=arguments.dataset_split, config_name=arguments.dataset_config_name)
    if any(named) or set(TEXT_COLUMNS) & set(rows.column_names):
        return open_rows(arguments, image_size=image_size, seed=seed)
    if arguments.image_column not in rows.column_names:
        raise ValueError(f"`image_column`={arguments.image_column!r} is not there. Columns here: {rows.column_names}.")
    rows = rows.select_columns(arguments.image_column)
    rows = rows if arguments.image_column == "image" else rows.rename_column(arguments.image_column, "image")
    return rows.cast_column("image", Image(decode=False))


def _open_encoded(arguments: DatasetArguments, image_size: int) -> Dataset:
    """Opens encoded images, refusing those of another size and splits, which a folder of them has not."""
    name, split = arguments.dataset_name, arguments.dataset_split
    height, width = json.loads((Path(name) / MANIFEST).read_text(encoding="utf-8"))["image_size"]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"`dataset_name`={name!r} holds images encoded at {height} x {width} px, but {image_size} x {image_size} "
            f"px are needed. Encode them again with `image_size`={image_size}."
        )
    if split != "train":
        raise ValueError(
            f"`dataset_split`={split!r}: the encoded images in {name!r} have no splits. Encode that split into a "
            "folder of its own, name that folder, and leave the split at 'train'."
        )
    return load_encoded(name)


def prepare_rows(
    rows: Rows,
    arguments: DatasetArguments,
    caption_arguments: CaptionArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    document_limit: DocumentLimit | None = None,
) -> tuple[Rows, CaptionReport | None]:
    """Cleans and filters rows as the recipe says; embedded scenes are clean already, as are encoded images themselves.

    Args:
        rows (`Dataset` or `IterableDataset`): From `open_rows`.
        arguments (`DatasetArguments`): Tells the source.
        caption_arguments (`CaptionArguments`): What to do.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Counts tokens for `max_caption_tokens`; rows whose text
            spells one of its special tokens are dropped.
        document_limit ([`DocumentLimit`], *optional*): Longer documents are dropped.

    Returns:
        `tuple[Rows, CaptionReport | None]`: the rows left, and what was dropped and why.
    """
    reserved = () if tokenizer is None else tokenizer.all_special_tokens
    share = caption_arguments.max_unreadable_share
    if "content" in rows.column_names:
        if caption_arguments.people != "keep" or caption_arguments.min_aesthetic_score is not None:
            raise ValueError("`people` and `min_aesthetic_score` filter pairs; leave them off for documents.")
        return prepare_documents(rows, reserved=reserved, max_unreadable_share=share, limit=document_limit)
    if rows.column_names == ["image"]:
        return prepare_pictures(rows, max_unreadable_share=share)
    if arguments.dataset_name.startswith(EMBEDDED):
        return rows, None
    if "image" not in rows.column_names:
        return prepare_encoded(rows, caption_arguments, tokenizer=tokenizer, reserved=reserved)
    return prepare_pairs(rows, caption_arguments, tokenizer=tokenizer, reserved=reserved)
