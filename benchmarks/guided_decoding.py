"""Times guided drawing, code by code, against transformers' own Emu3 and Janus with a decoder of the same size.

python benchmarks/guided_decoding.py --output guided_decoding.json

All three draw the same number of codes of a codebook of the same size from the same prompts, by plain sampling with
guidance, as their users call them: Emu3 through the library's two-forward guidance and `prefix_allowed_tokens_fn`,
Janus through its own loop with doubled rows and a static cache, CM3Leon through `draw_images`. They take turns, so
that a change of the machine's speed meets all alike; beside the wall clock stands the processor time of all threads.
The target is 1.5 times the tokens per second of one of them.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
)
from transformers.utils import logging

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonForConditionalGeneration, CodeSampling


TARGET = 1.5
GUIDANCE_SCALE = 3.0
CODEBOOK = 8192
TEXT_TOKENS = 2048
SIDE = 12  # codes along each side of an image
NUM_CODES = SIDE * SIDE
PROMPT_LENGTH = 24
MAX_POSITIONS = 512
FIRST_CODE = TEXT_TOKENS

Draw = Callable[[torch.Tensor], torch.Tensor]


def text_sizes(hidden_size: int, num_layers: int) -> dict[str, int]:
    """Sizes of a gated decoder with as many weights as CM3Leon's, whose feed-forward layers are not gated."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": round(8 * hidden_size / 3),
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 64,
        "max_position_embeddings": MAX_POSITIONS,
    }


def build_cm3leon(hidden_size: int, num_layers: int) -> tuple[torch.nn.Module, Draw]:
    """Builds CM3Leon and its drawing; returns the decoder, whose weights are counted, and a function of prompts."""
    last = TEXT_TOKENS + CODEBOOK
    config = CM3LeonConfig(
        vocab_size=last + 5,
        image_vocab_size=CODEBOOK,
        first_image_token_id=FIRST_CODE,
        break_token_id=last,
        eoss_token_id=last + 1,
        image_token_id=last + 2,
        first_sentinel_token_id=last + 3,
        num_sentinel_tokens=2,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=MAX_POSITIONS,
        image_size=8 * SIDE,
    )
    model = CM3LeonForConditionalGeneration(config).eval()
    sampling = CodeSampling(guidance_scale=GUIDANCE_SCALE)
    return model.model.layers, lambda prompts: model.draw_images(prompts, sampling=sampling)


def build_emu3(hidden_size: int, num_layers: int) -> tuple[torch.nn.Module, Draw]:
    """Builds Emu3 and its drawing as its documentation shows it."""
    codes = {f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(CODEBOOK)}
    config = Emu3Config(
        text_config={
            **text_sizes(hidden_size, num_layers),
            "vocab_size": TEXT_TOKENS + CODEBOOK + 5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vq_config={"codebook_size": CODEBOOK, "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32},
        vocabulary_map={**codes, "<image>": 3, "<|extra_200|>": 4},
    )
    model = Emu3ForConditionalGeneration(config).eval()
    allowed = list(codes.values())

    def draw(prompts: torch.Tensor) -> torch.Tensor:
        sequences = model.generate(
            prompts,
            max_new_tokens=NUM_CODES,
            do_sample=True,
            top_k=0,
            guidance_scale=GUIDANCE_SCALE,
            negative_prompt_ids=prompts[:, :3],
            prefix_allowed_tokens_fn=lambda row, ids: allowed,
        )
        return sequences[:, prompts.shape[1] :]

    return model.model.text_model.layers, draw


def build_janus(hidden_size: int, num_layers: int) -> tuple[torch.nn.Module, Draw]:
    """Builds Janus and its drawing."""
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            **text_sizes(hidden_size, num_layers),
            "vocab_size": TEXT_TOKENS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 16 * SIDE,
            "num_image_tokens": NUM_CODES,
            "projection_dim": hidden_size,
        },
        vq_config={
            "num_embeddings": CODEBOOK,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "projection_dim": hidden_size,
            "image_token_embed_dim": hidden_size,
        },
        image_token_id=3,
    )
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, generation_kwargs={"boi_token_id": 4}
    )

    def draw(prompts: torch.Tensor) -> torch.Tensor:
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_mode="image",
            do_sample=True,
            top_k=0,
            guidance_scale=GUIDANCE_SCALE,
        )

    return model.model.language_model.layers, draw


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Draws with each model in turn and returns what was found, and on what."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    sizes = arguments.hidden_size, arguments.num_layers
    models = {"cm3leon": build_cm3leon(*sizes), "emu3": build_emu3(*sizes), "janus": build_janus(*sizes)}
    prompts = torch.randint(5, TEXT_TOKENS, (arguments.batch_size, PROMPT_LENGTH))
    prompts[:, 0] = 1
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(arguments.num_repeats + 1):
        for name, (_, draw) in models.items():
            start = time.perf_counter(), time.process_time()
            codes = draw(prompts)
            if codes.shape != (arguments.batch_size, NUM_CODES):
                raise RuntimeError(f"{name} drew {tuple(codes.shape)} codes.")
            if repeat:  # the first one warms up
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    result: dict[str, object] = {}
    for index, clock in enumerate(("wall_clock", "processor")):
        medians = {name: statistics.median(times[index] for times in values) for name, values in seconds.items()}
        num_tokens = arguments.batch_size * NUM_CODES
        result[clock] = {
            "tokens_per_second": {name: round(num_tokens / value, 2) for name, value in medians.items()},
            "ratio_to_emu3": round(medians["emu3"] / medians["cm3leon"], 3),
            "ratio_to_janus": round(medians["janus"] / medians["cm3leon"], 3),
        }
    counts = {name: sum(weight.numel() for weight in decoder.parameters()) for name, (decoder, _) in models.items()}
    return {
        **result,
        "target": TARGET,
        "decoder_parameters": counts,
        "batch_size": arguments.batch_size,
        "codes_per_image": NUM_CODES,
        "num_repeats": arguments.num_repeats,
        "num_threads": arguments.num_threads,
        "machine": f"{platform.machine()}, {platform.system()}, {platform.processor() or 'unknown processor'}",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
    }


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--num_repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    for peer in ("emu3", "janus"):
        print(f"guided tokens per second: {result['wall_clock'][f'ratio_to_{peer}']} times those of {peer}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
