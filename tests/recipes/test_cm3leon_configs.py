import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForMultimodalLM

import encode_images
import make_patch_codes
import pretrain
from building import load_config
from hf_mm.cm3leon import CM3LeonProcessor
from hf_mm.cm3leon.blocks_cm3leon import ROPE_THETA
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.sources import DatasetArguments
from hf_mm.data.text_tokenizer import train_text_tokenizer
from hf_mm.training.image_tokenizer_arguments import ImageTokenizerArguments, build_image_tokenizer
from hf_mm.training.recipe import TrainingRecipe, parse_recipe


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"

# CM3Leon (arXiv 2309.02591), table 3: layers, width, learning rate, GPUs, tokens; then millions of parameters, which
# follow from 12 * layers * width ** 2, the vocabulary of 56,320 (section 2.1) and 4,096 positions.
SIZES = {
    "350m": (24, 1024, 6e-4, 256, 1.4e12, 364),
    "760m": (24, 1536, 5e-4, 256, 1.9e12, 772),
    "7b": (32, 4096, 1.2e-4, 512, 2.4e12, 6690),
}
TOKENS_PER_STEP = 8e6  # table 3
TOKENS_PER_PAIR = 1040  # 1,024 codes, about 9 tokens of caption, 3 delimiters, 3 more for each of 1 span in the mean


def parse(name: str, *words: str) -> dict[str, object]:
    parts = parse_recipe(*pretrain.ARGUMENTS, argv=["--config", str(CONFIGS / name), *words])
    return {key: value for part in parts for key, value in vars(part).items()}


@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_the_paper_stand_in_the_recipe_of_each_size(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    layers, width, learning_rate, num_gpus, num_tokens, millions = SIZES[size]
    values = parse(f"cm3leon_{size}_pretrain.yaml")
    assert (values["learning_rate"], values["warmup_steps"]) == (learning_rate, 1500)
    assert values["max_steps"] * TOKENS_PER_STEP == num_tokens
    rows_per_step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * num_gpus
    (num_retrieved,) = values["retrieved_counts"]
    pairs_per_step = rows_per_step * (1 + num_retrieved)
    assert pairs_per_step * TOKENS_PER_PAIR == pytest.approx(TOKENS_PER_STEP, rel=0.01)
    longest = (1 + num_retrieved) * (TOKENS_PER_PAIR + 20) + 3 * values["max_spans"]
    assert longest <= 4096 < longest + TOKENS_PER_PAIR  # one more pair would not fit
    assert f"on {num_gpus} GPUs" in (CONFIGS / f"cm3leon_{size}_pretrain.yaml").read_text().splitlines()[0]
    assert (values["mean_spans"], values["max_spans"], values["image_first_share"]) == (1, 16, 0)
    # The paper prints no more; these are of the training code that it shares with OPT.
    betas = (values["adam_beta1"], values["adam_beta2"], values["adam_epsilon"])
    assert betas == (0.9, 0.95, 1e-8) and (values["weight_decay"], values["max_grad_norm"]) == (0.1, 1.0)
    assert values["lr_scheduler_type"] == "linear" and values["min_learning_rate"] == pytest.approx(learning_rate / 10)

    words = ["--config", str(CONFIGS / f"cm3leon_{size}_pretrain.yaml"), "--image_tokenizer_name", "none"]
    config = load_config(parse_recipe(*pretrain.ARGUMENTS, argv=words)[0])
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (layers, width, 56_320)
    assert (config.max_position_embeddings, config.tokens_per_image, config.image_vocab_size) == (4096, 1024, 8192)
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config)
    trained = sum(weight.numel() for weight in model.train().parameters() if weight.requires_grad)
    assert trained / 1e6 == pytest.approx(millions, rel=0.005)


def test_every_size_states_the_same_but_for_the_size():
    free = {"config_name", "output_dir", "max_steps", "learning_rate", "min_learning_rate"}
    free |= {"per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    texts = [yaml.safe_load((CONFIGS / f"cm3leon_{size}_pretrain.yaml").read_text()) for size in SIZES]
    first, *others = [{name: value for name, value in text.items() if name not in free} for text in texts]
    assert all(other == first for other in others)


MAKERS = {"patch_codes_32px": "make_patch_codes"}  # of image tokenizers that are not trained


@pytest.mark.parametrize(
    ("name", "tokenizer", "millions"),
    [
        ("cm3leon_tiny", "vq_tiny", 1.02),
        ("cm3leon_icons", "patch_codes_32px", 6.10),
        ("chameleon_tiny", "vq_tiny", 1.20),
    ],
)
def test_small_models_fit_their_tokenizers_and_are_as_large_as_their_recipes_say(name, tokenizer, millions):
    config = AutoConfig.from_pretrained(CONFIGS / "models" / f"{name}.json")
    values = parse(f"{name}_pretrain.yaml")
    text = (CONFIGS / f"{name}_pretrain.yaml").read_text()
    for command in (
        f"{MAKERS.get(tokenizer, 'train_image_tokenizer')}.py --config recipes/configs/{tokenizer}.yaml",
        "--output_dir " + values["dataset_name"],
    ):
        assert command in text
    vq = yaml.safe_load((CONFIGS / f"{tokenizer}.yaml").read_text())
    assert values["image_tokenizer_name"] == vq["output_dir"]
    assert (config.image_size, config.image_vocab_size) == (vq["image_size"], vq["num_vq_embeddings"])
    side = config.image_size // (vq.get("patch_size") or 2 ** (len(vq["block_out_channels"]) - 1))
    assert f"{side**2} codes of {config.image_vocab_size}" in text.splitlines()[0]
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    # A caption, a picture and the most spans fit.
    assert config.max_position_embeddings - side**2 - 3 - 3 * values["max_spans"] > 60
    assert config.objective == "causal" or config.num_sentinel_tokens >= values["max_spans"]

    letters = np.random.default_rng(0).integers(ord("a"), ord("f"), (3000, 7))
    words = ["".join(map(chr, word)) for word in letters]
    text_tokenizer = train_text_tokenizer([f"{word} {word}" for word in words], values["vocab_size"])
    assert len(text_tokenizer) == values["vocab_size"]
    written = json.loads((CONFIGS / "models" / f"{name}.json").read_text())
    config.set_tokenizer(CM3LeonProcessor.from_config(config, text_tokenizer).tokenizer)
    assert {field: vars(config)[field] for field in written if field != "model_type"} == {
        field: value for field, value in written.items() if field != "model_type"
    }


@pytest.mark.parametrize(
    ("name", "tokenizer", "scenes"),
    [
        ("cm3leon_tiny", "vq_tiny", "shapes"),
        ("chameleon_tiny", "vq_tiny", "shapes"),
        pytest.param("cm3leon_icons", "patch_codes_32px", "icons", marks=pytest.mark.slow),
    ],
)
def test_small_recipes_run(name, tokenizer, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ["--config", str(CONFIGS / f"{tokenizer}.yaml")]
    if tokenizer in MAKERS:
        pytest.importorskip("faiss")
        # 1,200 pictures have patterns enough for all codes.
        make_patch_codes.main([*config, "--num_pictures=1200", "--num_scenes=1200", f"--output_dir={tmp_path / 'vq'}"])
    else:
        kinds = (ImageTokenizerArguments, DatasetArguments, CaptionArguments, TrainingRecipe)
        build_image_tokenizer(parse_recipe(*kinds, argv=config)[0]).save_pretrained(tmp_path / "vq")
    words = f"--dataset_name icon_scenes:{scenes} --num_scenes 9 --image_size 32"
    own = [f"--image_tokenizer_name={tmp_path / 'vq'}", f"--output_dir={tmp_path / 'codes'}"]
    encode_images.main([*words.split(), *own])
    words = "--max_steps 2 --warmup_steps 1 --per_device_train_batch_size 3 --num_samples 1 --report_to none"
    words += " --torch_compile false"
    own = [own[0], f"--output_dir={tmp_path / 'run'}", f"--dataset_name={tmp_path / 'codes'}", *words.split()]
    folder = pretrain.main([f"--config=recipes/configs/{name}_pretrain.yaml", "--num_eval_documents=2", *own])
    assert (folder / "samples.png").exists() and (folder / "model.safetensors").exists()


def test_the_baseline_has_the_trunk_of_the_transfusion_that_it_is_compared_with():
    ours = AutoConfig.from_pretrained(CONFIGS / "models" / "chameleon_tiny.json")
    theirs = AutoConfig.from_pretrained(CONFIGS / "models" / "transfusion_tiny.json").text_config
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act"
    assert [getattr(ours, name) for name in names.split()] == [getattr(theirs, name) for name in names.split()]
    assert not ours.tie_word_embeddings and not theirs.tie_word_embeddings
    assert ROPE_THETA == theirs.rope_parameters["rope_theta"]
    chameleon, transfusion = parse("chameleon_tiny_pretrain.yaml"), parse("transfusion_tiny_pretrain.yaml")
    assert chameleon["learning_rate"] * 3 == transfusion["learning_rate"] and ours.z_loss_weight == 1e-5
    for name in ("image_first_share", "caption_dropout", "vocab_size", "max_steps", "per_device_train_batch_size"):
        assert chameleon[name] == transfusion[name], name
