"""Times guided drawing, code by code, against transformers' own Emu3 and Janus with a decoder of the same size.

python benchmarks/guided_decoding.py --output guided_decoding.json

All three draw the same number of codes of a codebook of the same size from the same prompts, by plain sampling with
guidance, as their users call them: Emu3 through the library's two-forward guidance and `prefix_allowed_tokens_fn`,
Janus through its own loop with doubled rows and a static cache, CM3Leon through `draw_images`. They take turns, so
that a change of the machine's speed meets all alike. The floor of each is the products of its linear layers alone: all
weights read once for each code. The target is twice the codes per second of Janus for one image, 1.6 times for four.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

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
from timing import (
    Clock,
    benchmark_parser,
    count_parameters,
    describe,
    judge,
    products_alone,
    profile,
    record_products,
    take_turns,
    tell,
)


TARGETS = (1.6, 2.0)  # of Janus: for several images, and for one
GUIDANCE_SCALE = 3.0
CODEBOOK = 8192
TEXT_TOKENS = 2048
SIDE = 12  # codes along each side of an image
NUM_CODES = SIDE * SIDE
PROMPT_LENGTH = 24
MAX_POSITIONS = 512
FIRST_CODE = TEXT_TOKENS

Draw = Callable[[torch.Tensor], torch.Tensor]
Drawer = tuple[torch.nn.Module, torch.nn.Module, Draw]  # a model, its decoder layers, and what draws


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


def build_cm3leon(hidden_size: int, num_layers: int) -> Drawer:
    """Builds CM3Leon and its drawing."""
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
    return model, model.model.layers, lambda prompts: model.draw_images(prompts, sampling=sampling)


def build_emu3(hidden_size: int, num_layers: int) -> Drawer:
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

    return model, model.model.text_model.layers, draw


def build_janus(hidden_size: int, num_layers: int) -> Drawer:
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

    return model, model.model.language_model.layers, draw


BUILDERS: dict[str, Callable[[int, int], Drawer]] = {
    "cm3leon": build_cm3leon,
    "emu3": build_emu3,
    "janus": build_janus,
}


def summarise(clock: Clock, num_codes: int, targets: dict[str, float]) -> dict[str, Any]:
    """Sets CM3Leon beside its peers, and each beside its floor."""
    return {
        "codes_per_second": {name: round(num_codes / clock.median(name), 2) for name in clock},
        "times_faster_than": {
            "emu3": clock.ratio("emu3", "cm3leon"),
            "janus": judge(clock.ratio("janus", "cm3leon"), at_least=targets["janus"]),
        },
        "times_its_floor": {name: clock.ratio(name, f"{name}_floor") for name in BUILDERS},
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draws with each model in turn and returns what was found, and on what."""
    result = describe(arguments, (torch, transformers))
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    models = {name: build(arguments.hidden_size, arguments.num_layers) for name, build in BUILDERS.items()}
    result["decoder_parameters"] = {name: count_parameters(layers) for name, (_, layers, _) in models.items()}
    for batch_size in arguments.batch_sizes:
        prompts = torch.randint(5, TEXT_TOKENS, (batch_size, PROMPT_LENGTH))
        prompts[:, 0] = 1
        deeds: dict[str, Callable[[], object]] = {}
        for name, (model, _, draw) in models.items():
            if (shape := draw(prompts).shape) != (batch_size, NUM_CODES):
                raise RuntimeError(f"{name} drew {tuple(shape)} codes.")
            deeds[name] = partial(draw, prompts)
            deeds[f"{name}_floor"] = products_alone(record_products(model, deeds[name]))
        clocks = take_turns(deeds, arguments.num_repeats)
        target = {"janus": TARGETS[batch_size == 1]}
        result[f"batch_of_{batch_size}"] = found = {
            name: summarise(clock, batch_size * NUM_CODES, target) for name, clock in clocks.items()
        }
        if arguments.profile:
            found["profile"] = profile(deeds["cm3leon"])
    return result


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_repeats=5)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--profile", action="store_true", help="Shows where CM3Leon's time goes.")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
