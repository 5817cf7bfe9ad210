"""Counts the tokens per second of CM3 masking on one core: it should exceed a million, so that none waits.

python benchmarks/cm3_masking.py --output cm3_masking.json

Documents are pairs as long as the paper's (9 tokens of caption, 1024 codes) and as those of the small recipes. Beside
the wall clock stands the processor time, which other programs on the machine disturb less.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

from hf_mm.data.cm3_masking import CM3Masking, mask_document


PAIRS = {"256 px, 1024 codes": (9, 1024), "64 px, 256 codes": (25, 256), "32 px, 64 codes": (12, 64)}
SETTINGS = CM3Masking(
    break_token_id=1, eos_token_id=2, eoss_token_id=3, first_sentinel_token_id=4, num_sentinel_tokens=512
)


def measure(caption_length: int, num_codes: int, num_documents: int) -> dict[str, float]:
    """Masks one document many times over and returns what that took."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    caption, codes = (rng.integers(600, 9000, size).tolist() for size in (caption_length, num_codes))
    document = [2, *caption, 1, *codes, 2]
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(num_documents):
        mask_document(document, generator, SETTINGS)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    num_tokens = num_documents * len(document)
    return {
        "tokens_per_second": round(num_tokens / wall),
        "tokens_per_processor_second": round(num_tokens / processor),
        "microseconds_per_document": round(1e6 * wall / num_documents, 1),
    }


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_documents", type=int, default=50_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for lengths in PAIRS.values():
        measure(*lengths, num_documents=500)  # warms up
    result = {
        **{name: measure(*lengths, arguments.num_documents) for name, lengths in PAIRS.items()},
        "num_documents": arguments.num_documents,
        "machine": f"{platform.machine()}, {platform.system()}, {platform.processor() or 'unknown processor'}",
        "versions": {module.__name__: module.__version__ for module in (torch, np)},
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
