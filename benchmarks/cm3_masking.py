"""Counts the tokens per second of CM3 masking on one core: it should exceed a million, so that none waits.

python benchmarks/cm3_masking.py --output cm3_masking.json

Documents are pairs as long as the paper's (9 tokens of caption, 1024 codes) and as those of the small recipes. Beside
the wall clock stands the processor time, which other programs on the machine disturb less.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch

from hf_mm.data.cm3_masking import CM3Masking, mask_document
from timing import benchmark_parser, describe, judge, take_turns, tell


TARGET = 1_000_000  # tokens per second
PAIRS = {"256 px, 1024 codes": (9, 1024), "64 px, 256 codes": (25, 256), "32 px, 64 codes": (12, 64)}
SETTINGS = CM3Masking(
    break_token_id=1, eos_token_id=2, eoss_token_id=3, first_sentinel_token_id=4, num_sentinel_tokens=512
)


def make_document(caption_length: int, num_codes: int) -> list[int]:
    """Makes a document of a caption and codes."""
    rng = np.random.default_rng(0)
    caption, codes = (rng.integers(600, 9000, size).tolist() for size in (caption_length, num_codes))
    return [2, *caption, 1, *codes, 2]


def mask_often(document: list[int], num_documents: int) -> None:
    """Masks one document many times over."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_documents):
        mask_document(document, generator, SETTINGS)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Masks documents of each kind in turn and returns what that took, and on what."""
    result = describe(arguments, (torch, np))
    torch.set_num_threads(1)
    documents = {name: make_document(*lengths) for name, lengths in PAIRS.items()}
    deeds = {name: partial(mask_often, document, arguments.num_documents) for name, document in documents.items()}
    for name, clock in take_turns(deeds, arguments.num_repeats).items():
        seconds = {kind: clock.median(kind) / arguments.num_documents for kind in documents}
        result[name] = {
            "tokens_per_second": {
                kind: judge(round(len(documents[kind]) / value), at_least=TARGET) for kind, value in seconds.items()
            },
            "microseconds_per_document": {kind: round(1e6 * value, 1) for kind, value in seconds.items()},
        }
    return result


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_threads=None, num_repeats=5)
    parser.add_argument("--num_documents", type=int, default=10_000, help="Documents of each turn.")
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
