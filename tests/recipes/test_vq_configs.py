from pathlib import Path

import pytest
import torch
import yaml

from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.sources import DatasetArguments
from hf_mm.training.image_tokenizer_arguments import (
    ImageTokenizerArguments,
    build_image_tokenizer,
    find_latent_shape,
)
from hf_mm.training.recipe import TrainingRecipe, parse_recipe


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
ARGUMENTS = (ImageTokenizerArguments, DatasetArguments, CaptionArguments, TrainingRecipe)


def parse(name: str) -> tuple[ImageTokenizerArguments, TrainingRecipe]:
    tokenizer, _, _, recipe = parse_recipe(*ARGUMENTS, argv=["--config", str(CONFIGS / name)])
    return tokenizer, recipe


@pytest.mark.parametrize(
    ("name", "grid", "num_codes"),
    [("vq_tiny.yaml", 8, 512), ("vq_256px.yaml", 32, 8192)],
)
def test_pictures_become_as_many_codes_as_the_recipe_says(name: str, grid: int, num_codes: int) -> None:
    arguments, recipe = parse(name)
    with torch.device("meta"):
        vq = build_image_tokenizer(arguments)
    side = find_latent_shape(vq, arguments.image_size)[1]
    latents = vq.encode(torch.empty(1, 3, arguments.image_size, arguments.image_size, device="meta")).latents
    assert latents.shape[2:] == (side, side) == (grid, grid) and vq.config.num_vq_embeddings == num_codes
    first_line = " ".join((CONFIGS / name).read_text().splitlines()[:3])
    assert f"{grid**2} codes of {num_codes}" in first_line
    assert arguments.quantization_start_step <= arguments.last_code_revival_step < recipe.max_steps


def test_numbers_of_the_papers_stand_in_the_recipe_of_the_paper() -> None:
    arguments, recipe = parse("vq_256px.yaml")
    assert (arguments.image_size, arguments.num_vq_embeddings, recipe.max_steps) == (256, 8192, 800_000)
    assert [width / arguments.block_out_channels[0] for width in arguments.block_out_channels] == [1, 1, 2, 4]
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * 8 == 192
    assert (arguments.codebook_weight, arguments.commitment_weight, arguments.perceptual_weight) == (1, 0.25, 1)
    assert arguments.perceptual_model and arguments.discriminator_start_step > 0


def test_every_number_of_the_recipe_of_the_paper_says_whose_it_is() -> None:
    for line in (CONFIGS / "vq_256px.yaml").read_text().splitlines():
        key, _, comment = line.partition("#")
        numbers = yaml.safe_load(key)
        if numbers and not isinstance(*numbers.values(), str) and list(numbers)[0] not in UNMARKED:
            assert any(word in comment for word in ("CM3Leon", "MAS", "VQGAN", "ours", "with the next")), line


# What has no effect on the result, and the second half of the batch size.
UNMARKED = {"seed", "dataloader_num_workers", "logging_steps", "save_steps", "sample_steps"}
UNMARKED |= {"gradient_accumulation_steps"}
