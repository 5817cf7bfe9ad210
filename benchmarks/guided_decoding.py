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
from transformers import GenerationConfig
from transformers.utils import logging

from code_peers import (
    BOI,
    BOS,
    CODEBOOK,
    EOS,
    FIRST_CODE,
    FIRST_TEXT,
    PAD,
    SIDE,
    TEXT_TOKENS,
    build_cm3leon,
    build_emu3,
    build_janus,
    decoder_layers,
)
from hf_mm.cm3leon import CodeSampling
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
NUM_CODES = SIDE**2
PROMPT_LENGTH = 24
MAX_POSITIONS = 512

Draw = Callable[..., torch.Tensor]
Drawer = tuple[torch.nn.Module, Draw]


def make_cm3leon(hidden_size: int, num_layers: int) -> Drawer:
    """Builds CM3Leon and its drawing."""
    model = build_cm3leon(hidden_size, num_layers, MAX_POSITIONS).eval()
    sampling = CodeSampling(guidance_scale=GUIDANCE_SCALE)
    return model, lambda prompts, **cache: model.draw_images(prompts, sampling=sampling, **cache)


def make_emu3(hidden_size: int, num_layers: int) -> Drawer:
    """Builds Emu3 and its drawing as its documentation shows it."""
    model = build_emu3(hidden_size, num_layers, MAX_POSITIONS).eval()
    allowed = list(range(FIRST_CODE, FIRST_CODE + CODEBOOK))

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

    return model, draw


def make_janus(hidden_size: int, num_layers: int) -> Drawer:
    """Builds Janus and its drawing."""
    model = build_janus(hidden_size, num_layers, MAX_POSITIONS).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI}
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

    return model, draw


BUILDERS: dict[str, Callable[[int, int], Drawer]] = {
    "cm3leon": make_cm3leon,
    "emu3": make_emu3,
    "janus": make_janus,
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
    result["decoder_parameters"] = {
        name: count_parameters(decoder_layers(model)) for name, (model, _) in models.items()
    }
    rounds: dict[int, dict[str, Callable[[], object]]] = {}
    for batch_size in arguments.batch_sizes:
        prompts = torch.randint(FIRST_TEXT, TEXT_TOKENS, (batch_size, PROMPT_LENGTH))
        prompts[:, 0] = BOS
        rounds[batch_size] = deeds = {}
        for name, (model, draw) in models.items():
            if (shape := draw(prompts).shape) != (batch_size, NUM_CODES):
                raise RuntimeError(f"{name} drew {tuple(shape)} codes.")
            deeds[name] = partial(draw, prompts)
            deeds[f"{name}_floor"] = products_alone(record_products(model, deeds[name]))
            if arguments.torch_compile and name == "cm3leon":
                deeds[name] = partial(draw, prompts, cache_implementation="static")
    if arguments.torch_compile:
        models["cm3leon"][0].compile()
    for batch_size, deeds in rounds.items():
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
    parser.add_argument("--torch_compile", action="store_true", help="Compiles CM3Leon, with a static cache.")
    parser.add_argument("--profile", action="store_true", help="Shows where CM3Leon's time goes.")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
