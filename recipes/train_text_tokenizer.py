"""Trains a text tokenizer on captions.

python recipes/train_text_tokenizer.py --dataset_name icon_scenes:shapes --vocab_size 512 --output_dir runs/tokenizer
python recipes/train_text_tokenizer.py --dataset_name "my/folder/*.parquet" --text_column caption
python recipes/train_text_tokenizer.py --config my_tokenizer.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_mm.data.formats import Rows, iterate_captions, load_rows
from hf_mm.data.icon_scenes import icon_scenes_stream
from hf_mm.data.text_tokenizer import train_text_tokenizer
from hf_mm.training.recipe import parse_recipe


@dataclass
class TokenizerRecipe:
    """The captions to learn from, and the size of the vocabulary."""

    dataset_name: str = field(
        default="icon_scenes:shapes",
        metadata={"help": "icon_scenes:shapes or icon_scenes:icons; or an image folder, files, or a Hub dataset id."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to read."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read the dataset as a stream."})
    image_column: str = field(default="image", metadata={"help": "Column with images; they are not read."})
    text_column: str | None = field(default=None, metadata={"help": "Column with captions, if not called text."})
    description_column: str | None = field(default=None, metadata={"help": "Column with descriptions."})
    keywords_column: str | None = field(default=None, metadata={"help": "Column with keywords."})
    categories_column: str | None = field(default=None, metadata={"help": "Column with categories."})
    max_rows: int = field(default=20_000, metadata={"help": "Rows to learn from; of icon scenes, rows to draw."})
    vocab_size: int = field(default=512, metadata={"help": "Tokens, 256 bytes and 6 special tokens included."})
    min_frequency: int = field(default=2, metadata={"help": "How often a pair must occur to become a token."})
    output_dir: str = field(default="runs/text_tokenizer", metadata={"help": "Folder for the tokenizer."})


def load_captioned_rows(recipe: TokenizerRecipe) -> Rows:
    """Loads the rows that the recipe names."""
    source, _, glyph_set = recipe.dataset_name.partition(":")
    if source == "icon_scenes":
        return icon_scenes_stream(recipe.max_rows, glyph_set=glyph_set, size_px=16, split=recipe.dataset_split)
    return load_rows(
        recipe.dataset_name,
        split=recipe.dataset_split,
        config_name=recipe.dataset_config_name,
        streaming=recipe.streaming,
        image_column=recipe.image_column,
        text_column=recipe.text_column,
        description_column=recipe.description_column,
        keywords_column=recipe.keywords_column,
        categories_column=recipe.categories_column,
    ).take(recipe.max_rows)


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, saves and says what came out."""
    (recipe,) = parse_recipe(TokenizerRecipe, argv=argv)
    captions = iterate_captions(load_captioned_rows(recipe))
    tokenizer = train_text_tokenizer(captions, recipe.vocab_size, min_frequency=recipe.min_frequency)
    tokenizer.save_pretrained(recipe.output_dir)
    print(f"A tokenizer of {len(tokenizer)} tokens is in {recipe.output_dir}.")
    return Path(recipe.output_dir)


if __name__ == "__main__":
    main()
