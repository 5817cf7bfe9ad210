"""Finds the neighbours of a recipe's rows in a memory bank once, so that training reads them and never searches.

accelerate launch recipes/build_retrieval_index.py --dataset_name my/pictures --text_column caption --image_size 256 \
    --output_dir runs/retrieval
accelerate launch recipes/build_retrieval_index.py --dataset_name icon_scenes:shapes --image_size 32 \
    --clip_name runs/clip_tiny --output_dir runs/retrieval
accelerate launch recipes/build_retrieval_index.py --dataset_name my/pictures --text_column caption \
    --memory_name my/archive --output_dir runs/retrieval

Rows are named and prepared as for encode_images.py, with pictures: a neighbour is the number of a row, and row n of
what that recipe writes is row n here. The memory bank is the data set itself unless another is named.

Every process that accelerate starts embeds and searches its share; the same command finishes what was cut off, in any
number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.clip_encoder import ClipEncoder
from hf_mm.data.neighbors import IDS, SCORES, open_neighbors
from hf_mm.data.retrieval import INDEX, MEMORY, NEIGHBORS, QUERIES, find_neighbors
from hf_mm.data.retrieval_index import build_index
from hf_mm.data.retrieval_source import RowSource, note_source
from hf_mm.data.retrieval_strategy import RetrievalStrategy
from hf_mm.data.retrieval_vectors import VectorFolder, embed_rows
from hf_mm.data.sources import DatasetArguments
from hf_mm.training.recipe import end_processes, parse_recipe, start_processes


@dataclass
class IndexArguments:
    """What the rows are embedded with, what they are searched in, and where to."""

    clip_name: str = field(
        default="openai/clip-vit-base-patch32", metadata={"help": "Frozen CLIPModel, a folder or a Hub id (Sec. 2.1)."}
    )
    memory_name: str | None = field(
        default=None, metadata={"help": "Memory bank, any source of rows; none: the data set itself."}
    )
    memory_split: str = field(default="train", metadata={"help": "Split of the memory bank to read."})
    memory_num_scenes: int = field(default=20_000, metadata={"help": "Icon scenes of an embedded memory bank."})
    index_factory: str | None = field(
        default=None, metadata={"help": "Index as FAISS names it: Flat, IVF1024,SQ8, HNSW32; none: by the rows."}
    )
    image_size: int = field(default=256, metadata={"help": "Pixels at which embedded scenes are drawn."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Text tokenizer named to encode_images.py, which decides what rows are dropped."},
    )
    output_dir: str = field(default="runs/retrieval", metadata={"help": "Folder for vectors, index and neighbours."})
    batch_size: int = field(default=64, metadata={"help": "Rows embedded at once."})
    num_shards: int = field(
        default=64, metadata={"help": "Files to write, at most one a row; one is the least redone."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of embedded scenes, as to encode_images.py, and of dropout."})


def name_source(arguments: IndexArguments, data_args: DatasetArguments, caption_args: CaptionArguments) -> RowSource:
    """Names rows as encode_images.py does."""
    return RowSource(data_args, caption_args, arguments.image_size, arguments.seed, arguments.tokenizer_name)


def describe(folder: Path) -> str:
    """Says how many neighbours were found and how near they are."""
    rows = open_neighbors(folder).with_format("numpy")
    counts = np.array([len(ids) for ids in rows[IDS][:]])
    scores = np.concatenate(rows[SCORES][:])
    short = f"{(counts < counts.max()).sum()} rows have fewer than {counts.max()}"
    return f"{counts.mean():.2f} neighbours a row, mean relevance {scores.mean():.3f}; {short}."


def main(argv: Sequence[str] | None = None) -> Path:
    """Embeds both sides, builds the index and finds this process's share of the neighbours."""
    arguments, strategy, data_args, caption_args = parse_recipe(
        IndexArguments, RetrievalStrategy, DatasetArguments, CaptionArguments, argv=argv
    )
    folder = Path(arguments.output_dir)
    state = start_processes()
    share = {"process_index": state.process_index, "num_processes": state.num_processes}
    encoder = ClipEncoder.from_pretrained(arguments.clip_name, state.device)
    has_memory = arguments.memory_name is not None
    with state.main_process_first():
        rows = name_source(arguments, data_args, caption_args).open()
        memory_args = replace(
            data_args,
            dataset_name=arguments.memory_name or data_args.dataset_name,
            dataset_split=arguments.memory_split,
            num_scenes=arguments.memory_num_scenes,
        )
        memory_source = name_source(arguments, memory_args if has_memory else data_args, caption_args)
        memory_rows = memory_source.open() if has_memory else rows
    strategy.check_memory(len(memory_rows))
    sides = {QUERIES: (rows, strategy.query_dropout), MEMORY: (memory_rows, None)}
    for name, (side, dropout) in (sides if has_memory else {MEMORY: sides[QUERIES]}).items():
        embed_rows(
            side,
            encoder,
            folder / name,
            query_dropout=dropout,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            num_shards=min(arguments.num_shards, len(side)),
            **share,
        )
    state.wait_for_everyone()
    memory = VectorFolder.open(folder / MEMORY)
    queries = VectorFolder.open(folder / QUERIES) if has_memory else memory
    build_index(memory, folder / INDEX, factory=arguments.index_factory, wait=state.wait_for_everyone, **share)
    find_neighbors(queries, memory, folder / INDEX, folder / NEIGHBORS, strategy, **share)
    state.wait_for_everyone()
    if state.is_main_process:
        note_source(folder, memory_source, arguments.clip_name)
        print(describe(folder / NEIGHBORS))
        print(f"Neighbours of {len(rows)} rows among {len(memory_rows)} are in {folder / NEIGHBORS}.")
    end_processes(state)
    return folder


if __name__ == "__main__":
    main()
