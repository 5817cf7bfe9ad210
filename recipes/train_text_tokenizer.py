"""Trains a text tokenizer on captions.

python recipes/train_text_tokenizer.py --dataset_name icon_scenes:shapes --vocab_size 512 --output_dir runs/tokenizer
python recipes/train_text_tokenizer.py --dataset_name "my/folder/*.parquet" --text_column caption
python recipes/train_text_tokenizer.py --config my_tokenizer.yaml
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_mm.data.formats import iterate_captions
from hf_mm.data.sources import DatasetArguments, open_rows
from hf_mm.data.text_tokenizer import train_text_tokenizer
from hf_mm.training.recipe import parse_recipe


@dataclass
class TextTokenizerArguments:
    """How many captions to learn from, and the size of the vocabulary."""

    vocab_size: int = field(default=512, metadata={"help": "Tokens, 256 bytes and 6 special tokens included."})
    min_frequency: int = field(default=2, metadata={"help": "How often a pair must occur to become a token."})
    streaming: bool = field(default=False, metadata={"help": "Read the dataset as a stream."})
    max_captions: int | None = field(
        default=None, metadata={"help": "Captions to learn from: text, description, keywords and categories count."}
    )
    output_dir: str = field(default="runs/text_tokenizer", metadata={"help": "Folder for the tokenizer."})


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, saves and says what came out."""
    arguments, data_args = parse_recipe(TextTokenizerArguments, DatasetArguments, argv=argv)
    rows = open_rows(data_args, image_size=16, streaming=arguments.streaming)  # the pictures are not looked at
    captions = itertools.islice(iterate_captions(rows), arguments.max_captions)
    tokenizer = train_text_tokenizer(captions, arguments.vocab_size, min_frequency=arguments.min_frequency)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"A tokenizer of {len(tokenizer)} tokens is in {arguments.output_dir}.")
    return Path(arguments.output_dir)


if __name__ == "__main__":
    main()
