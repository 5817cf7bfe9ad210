"""Times a training step of Transfusion against `transfusion-pytorch` and against its own matrix products alone.

pip install transfusion-pytorch==0.20.0
python benchmarks/training_step.py --output training_step.json
python benchmarks/training_step.py --hidden_size 448 --output training_step_60m.json

A step is forward, backward, the clipping of gradients and fused AdamW, on 8 sequences of 32 text tokens and an image
of 64 patches, with each library's own preparation of what it is given: tensors for ours, lists of parts for the peer.
The floor is every linear layer's product and both its gradients, without attention. The least that a step can do adds
attention's own products, the clipping and AdamW: no loss, softmax, norm or activation, so no model reaches it either.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from timing import (
    DTYPES,
    attention_alone,
    autocast,
    count_parameters,
    describe,
    one_after_another,
    optimizer_alone,
    products_alone,
    profile,
    record_products,
    take_turns,
    tell,
)
from transfusion_peers import (
    CHANNELS,
    OURS,
    PATCH_SIZE,
    PROMPT_LENGTH,
    SIDE,
    VOCAB_SIZE,
    build_all,
    common_parser,
    summarise,
)


TARGETS = {"same_trunk": 3.5, "same_parameters": 1.4, "over_floor": 1.3}
LARGE, LARGE_TARGET = 40_000_000, 1.2  # from that many parameters on, over the peer of as many
NUM_PATCHES = SIDE * SIDE


def loss_of_ours(model: nn.Module, batch_size: int) -> torch.Tensor:
    """Draws text and images, and the loss of both."""
    config = model.config
    text = torch.randint(6, VOCAB_SIZE, (batch_size, PROMPT_LENGTH))
    image = torch.full((batch_size, NUM_PATCHES + 2), config.image_token_id)
    image[:, 0], image[:, -1] = config.boi_token_id, config.eoi_token_id
    input_ids = torch.cat([text, image], dim=1)
    labels = input_ids.masked_fill(input_ids == config.image_token_id, -100)
    images = torch.randn(batch_size, CHANNELS, PATCH_SIZE * SIDE, PATCH_SIZE * SIDE)
    return model(input_ids=input_ids, labels=labels, latents=images).loss


def loss_of_peer(model: nn.Module, batch_size: int) -> torch.Tensor:
    """The same of the peer, which is given a list of parts for each sequence."""
    texts = torch.randint(0, VOCAB_SIZE, (batch_size, PROMPT_LENGTH))
    patches = torch.randn(batch_size, SIDE, SIDE, CHANNELS * PATCH_SIZE**2)
    return model([[text, image] for text, image in zip(texts, patches, strict=True)])


def training_step(
    model: nn.Module, loss_of: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> None:
    """One step."""
    with autocast(dtype):
        loss = loss_of()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def least_step(model: nn.Module, floor: Callable[[], object], batch_size: int, dtype: torch.dtype) -> Callable:
    """What no step of one of our models can leave out."""
    text = model.config.text_config
    length = PROMPT_LENGTH + NUM_PATCHES + 2
    shape = (batch_size * text.num_attention_heads, length, text.hidden_size // text.num_attention_heads)
    attention = attention_alone(shape, length, text.num_hidden_layers, backward=True, dtype=dtype)
    return one_after_another(floor, attention, optimizer_alone(model))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times each model and each floor in turn and returns what was found, and on what."""
    result = describe(arguments, (torch, transformers, diffusers))
    torch.manual_seed(0)
    torch.set_num_threads(arguments.num_threads)
    dtype = DTYPES[arguments.dtype]
    models = build_all(arguments.hidden_size, arguments.num_layers)
    if dtype == torch.bfloat16:  # as `attn_implementation: auto` of the recipes
        for name in OURS:
            models[name].set_attn_implementation("eager")
    result["parameters"] = {name: count_parameters(model) for name, model in models.items()}
    deeds: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        loss_of = partial(loss_of_peer if name == "peer" else loss_of_ours, model.train(), arguments.batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        deeds[name] = partial(training_step, model, loss_of, optimizer, dtype)
        deeds[f"{name}_floor"] = products_alone(record_products(model, loss_of), backward=True, dtype=dtype)
        if name in OURS:
            deeds[f"{name}_least"] = least_step(model, deeds[f"{name}_floor"], arguments.batch_size, dtype)
        if arguments.torch_compile and name in OURS:
            model.compile()  # as `torch_compile: true` of the recipes
    clocks = take_turns(deeds, arguments.num_repeats)
    is_large = result["parameters"]["same_parameters"] >= LARGE
    targets = TARGETS | ({"same_parameters": LARGE_TARGET} if is_large else {})
    result |= {name: summarise(clock, targets) for name, clock in clocks.items()}
    if arguments.profile:
        result["profile"] = {name: profile(deeds[name]) for name in OURS}
    return result


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = common_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
