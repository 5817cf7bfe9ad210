"""Times packed windows: the cost of a token as documents get more, and training on codes against transformers' Emu3.

python benchmarks/packing.py --output packing.json

First, windows of 1,024 tokens cut into 1 to 32 documents, for both families, forward and backward: the same tokens and
images each time, so a longer document only has more to look back at. Second, a training step on captions and codes of
unequal lengths, each document seeing itself alone: CM3Leon packed, Emu3 packed the way the library offers (positions
that restart, from which it makes a dense block-diagonal mask), and both with a row for each document, padded.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from code_peers import (
    BOI,
    BOS,
    CODEBOOK,
    EOI,
    FIRST_CODE,
    FIRST_TEXT,
    IMAGE,
    PAD,
    PATCH_SIZE,
    TEXT_TOKENS,
    build_cm3leon,
    build_emu3,
    build_transfusion,
    decoder_layers,
)
from hf_mm.data.collators import collate_documents
from hf_mm.data.packing import pack_windows
from timing import Clock, benchmark_parser, count_parameters, describe, judge, profile, take_turns, tell


Batch = dict[str, torch.Tensor]
NUM_DOCUMENTS = (1, 2, 4, 8, 16, 32)
UNIT = 32  # tokens of the shortest document: text, and an image of 16 patches or codes
SIDE = 4  # patches along each side of an image
MIN_POSITIONS = 256  # the least that a CM3Leon with pictures of 144 codes takes
TARGETS = {"flat": 1.1, "emu3": 1.3}


def cut_window(length: int, num_documents: int) -> torch.Tensor:
    """Gives the positions of a window of documents of equal length, `(1, length)`."""
    return torch.arange(length)[None] % (length // num_documents)


def code_window(length: int, num_documents: int) -> Batch:
    """Makes a window of text and codes, the same but for where documents begin."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_TEXT, TEXT_TOKENS, (1, length), generator=generator)
    codes = torch.randint(FIRST_CODE, FIRST_CODE + CODEBOOK, (1, length), generator=generator)
    ids = torch.where(torch.arange(length) % UNIT < UNIT // 2, ids, codes)
    return {"input_ids": ids, "labels": ids, "position_ids": cut_window(length, num_documents)}


def image_window(length: int, num_documents: int) -> Batch:
    """Makes a window of text and noised images, likewise."""
    generator = torch.Generator().manual_seed(0)
    num_units, num_patches = length // UNIT, SIDE**2
    text = torch.randint(FIRST_TEXT, TEXT_TOKENS, (num_units, UNIT - num_patches - 2), generator=generator)
    image = torch.full((num_units, num_patches + 2), IMAGE)
    image[:, 0], image[:, -1] = BOI, EOI
    ids = torch.cat([text, image], -1).flatten()[None]
    latents = torch.randn(num_units, 3, PATCH_SIZE * SIDE, PATCH_SIZE * SIDE, generator=generator)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "position_ids": cut_window(length, num_documents),
        "latents": latents,
        "timesteps": torch.randint(1000, (num_units,), generator=generator).float(),
        "noise": torch.randn(latents.shape, generator=generator),
    }


def make_documents(window_length: int, num_windows: int) -> list[dict[str, Any]]:
    """Makes captions of 4 to 40 tokens with 64 codes behind them, as many as the windows hold."""
    generator = torch.Generator().manual_seed(0)
    documents: list[dict[str, Any]] = []
    while True:
        length = int(torch.randint(4, 41, (), generator=generator))
        caption = torch.randint(FIRST_TEXT, TEXT_TOKENS, (length,), generator=generator)
        codes = torch.randint(FIRST_CODE, FIRST_CODE + CODEBOOK, (64,), generator=generator)
        ids = torch.cat([torch.tensor([BOS]), caption, codes])
        lengths = [len(document["input_ids"]) for document in documents]
        if len(pack_windows([*lengths, len(ids)], window_length)) > num_windows:
            return documents
        documents.append({"input_ids": ids.numpy(), "labels": ids.masked_fill(ids == BOS, -100).numpy()})


def pass_both_ways(model: nn.Module, batch: Batch) -> None:
    """Forward and backward."""
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad()


def training_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    model(**batch, use_cache=False).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def refuse_leaks(name: str, model: nn.Module, batch: Batch) -> None:
    """Checks that a packed document's loss does not depend on the one in front of it.

    Raises:
        RuntimeError: If it does, so that the work compared would not be the same.
    """
    row = {key: values[:1].clone() for key, values in batch.items()}
    start = int((row["position_ids"][0] == 0).nonzero()[1])
    row["labels"][:, :start] = -100
    losses = []
    for _ in range(2):
        losses.append(float(model(**row, use_cache=False).loss))
        row["input_ids"][:, :start] = row["input_ids"][:, :start].flip(-1)
    if abs(losses[0] - losses[1]) > 1e-5:
        raise RuntimeError(f"{name}: packed documents see each other, losses {losses}.")


def measure_flatness(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times windows of more and more documents."""
    length = arguments.window_length
    sizes = arguments.hidden_size, arguments.num_layers, max(length, MIN_POSITIONS)
    families: dict[str, tuple[nn.Module, Callable[[int, int], Batch]]] = {
        "cm3leon": (build_cm3leon(*sizes), code_window),
        "transfusion": (build_transfusion(*sizes, side=SIDE), image_window),
    }
    found = {}
    for name, (model, window) in families.items():
        model.train()
        numbers = [number for number in NUM_DOCUMENTS if length // number >= UNIT]
        deeds = {str(number): partial(pass_both_ways, model, window(length, number)) for number in numbers}
        clocks = take_turns(deeds, arguments.num_repeats)
        found[name] = {clock: describe_flatness(values, length) for clock, values in clocks.items()}
        if arguments.profile:
            found[name]["profile"] = profile(deeds[str(numbers[-1])])
    return found


def describe_flatness(clock: Clock, length: int) -> dict[str, Any]:
    """Gives the cost of a token by the number of documents, and the costliest against one document."""
    ratios = {name: clock.ratio(name, "1") for name in clock}
    return {
        "microseconds_per_token": {name: round(1e6 * clock.median(name) / length, 2) for name in clock},
        "times_one_document": ratios,
        "highest_over_one_document": judge(max(ratios.values()), at_most=TARGETS["flat"]),
        "highest_over_lowest": round(max(ratios.values()) / min(ratios.values()), 3),
    }


def measure_codes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times training steps of CM3Leon and Emu3 on the same documents, packed and padded."""
    length = arguments.window_length
    documents = make_documents(length, arguments.batch_size)
    packed, padded = (
        collate_documents(documents, pad_token_id=PAD, window_length=window) for window in (length, None)
    )
    sizes = arguments.hidden_size, arguments.num_layers, max(length, MIN_POSITIONS)
    models: dict[str, nn.Module] = {"cm3leon": build_cm3leon(*sizes).train(), "emu3": build_emu3(*sizes).train()}
    deeds: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        refuse_leaks(name, model, packed)
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
        for way, batch in (("packed", packed), ("padded", padded)):
            deeds[f"{name}_{way}"] = partial(training_step, model, batch, optimizer)
    num_tokens = sum(len(document["input_ids"]) for document in documents)
    found: dict[str, Any] = {
        "documents": len(documents),
        "tokens": num_tokens,
        "positions": {"packed": packed["input_ids"].numel(), "padded": padded["input_ids"].numel()},
        "decoder_parameters": {name: count_parameters(decoder_layers(model)) for name, model in models.items()},
        "parameters": {
            name: sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            for name, model in models.items()
        },
    }
    for name, clock in take_turns(deeds, arguments.num_repeats).items():
        found[name] = {
            "milliseconds": clock.milliseconds(),
            "tokens_per_second": {deed: round(num_tokens / clock.median(deed)) for deed in clock},
            "times_faster_than_emu3": judge(clock.ratio("emu3_packed", "cm3leon_packed"), at_least=TARGETS["emu3"]),
            "times_faster_packed_than_padded": {
                model: clock.ratio(f"{model}_padded", f"{model}_packed") for model in models
            },
        }
    if arguments.profile:
        found["profile"] = profile(deeds["cm3leon_packed"])
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both and returns what was found, and on what."""
    result = describe(arguments, (torch, transformers))
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    result["cost_of_a_token"] = measure_flatness(arguments)
    result["training_on_codes"] = measure_codes(arguments)
    return result


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_repeats=5)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--window_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=2, help="Windows of the comparison with Emu3.")
    parser.add_argument("--profile", action="store_true", help="Shows where the time of ours goes.")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
