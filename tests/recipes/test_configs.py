import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForMultimodalLM

import encode_images
import make_patch_codes
import pretrain
import sft
import train_clip
import train_image_tokenizer
from building import ModelArguments, load_config
from hf_mm.data.caption_arguments import CaptionArguments
from hf_mm.data.sources import DatasetArguments
from hf_mm.training.image_tokenizer_arguments import ImageTokenizerArguments, build_image_tokenizer, find_latent_shape
from hf_mm.training.recipe import TrainingRecipe, parse_recipe


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
PATCH_ARGUMENTS = (make_patch_codes.PatchCodeArguments, DatasetArguments)
VAE_ARGUMENTS = (ImageTokenizerArguments, DatasetArguments, CaptionArguments, TrainingRecipe)

# Transfusion (arXiv 2408.11039), table 2: layers, width, heads; then the parameters of the name, in units of a billion.
SIZES = {
    "0.16b": (16, 768, 12, 0.16),
    "0.37b": (24, 1024, 16, 0.37),
    "0.76b": (24, 1536, 24, 0.76),
    "1.4b": (24, 2048, 16, 1.4),
    "7b": (32, 4096, 32, 7),
}
# Section 4.1, the same for all sizes.
OPTIMISATION = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "learning_rate": 3e-4,
    "min_learning_rate": 1.5e-5,
    "warmup_steps": 4000,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "max_steps": 250_000,
    "window_length": 4096,
    "image_first_share": 0.2,
    "text_token_share": 0.5,
}


def kinds_of(config: Path) -> tuple[type, ...]:
    if config.name.startswith("clip"):
        return train_clip.ARGUMENTS
    if config.stem.endswith("sft"):
        return sft.ARGUMENTS
    if config.name.startswith("patch_codes"):
        return PATCH_ARGUMENTS
    return VAE_ARGUMENTS if config.name.startswith(("vae", "vq")) else pretrain.ARGUMENTS


def parse(name: str, *words: str) -> dict[str, object]:
    config = ROOT / "recipes" / "configs" / name
    parts = parse_recipe(*kinds_of(config), argv=["--config", str(config), *words])
    return {key: value for part in parts for key, value in vars(part).items()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_opens_with_paper_and_command_and_parses(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    comment = "".join(line for line in config.read_text().splitlines(True) if line.startswith("#"))
    assert config.read_text().startswith("#") and re.search(r"arXiv \d{4}\.\d{5}", comment)
    recipes = {
        VAE_ARGUMENTS: "train_image_tokenizer",
        PATCH_ARGUMENTS: "make_patch_codes",
        train_clip.ARGUMENTS: "train_clip",
        sft.ARGUMENTS: "sft",
    }
    recipe = recipes.get(kinds_of(config), "pretrain")
    assert re.search(
        rf"# accelerate launch .*recipes/{recipe}\.py --config (recipes/configs/{config.name}|<this file>)", comment
    )
    values = parse(config.name)
    for name, value in yaml.safe_load(config.read_text()).items():
        assert values[name] == value or values[name] == float(value), name


@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_the_paper_stand_in_the_recipe_of_each_size(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    layers, width, heads, billions = SIZES[size]
    values = parse(f"transfusion_{size}_pretrain.yaml")
    for name, number in OPTIMISATION.items():
        assert values[name] == number, name
    assert values["noise_cap"] is None  # table 8 alone has it
    rows_per_step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * 8
    assert rows_per_step == 5120  # documents of about 400 tokens, of which a picture takes 258: 2M tokens

    arguments, *_ = parse_recipe(
        *pretrain.ARGUMENTS,
        argv=[
            "--config",
            str(ROOT / f"recipes/configs/transfusion_{size}_pretrain.yaml"),
            "--image_tokenizer_name",
            "none",
        ],
    )
    config = load_config(arguments)
    text = config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (layers, width, heads)
    assert text.vocab_size == 32_000 + 3 and text.max_position_embeddings == 4096
    assert (config.patch_layer, config.patch_size, config.image_size) == ("linear", 2, 256)
    assert (config.prediction_type, config.num_train_timesteps, config.num_inference_steps) == ("epsilon", 1000, 250)
    assert (config.timestep_sampling, config.diffusion_loss_weight) == ("uniform", 5)
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config)
    trained = sum(weight.numel() for weight in model.train().parameters() if weight.requires_grad)
    assert trained / 1e9 == pytest.approx(billions, rel=0.05)


def test_every_size_states_the_same_but_for_the_size(monkeypatch):
    free = {
        "config_name",
        "output_dir",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
    }
    texts = [
        yaml.safe_load((ROOT / f"recipes/configs/transfusion_{size}_pretrain.yaml").read_text()) for size in SIZES
    ]
    first, *others = [{name: value for name, value in text.items() if name not in free} for text in texts]
    assert all(other == first for other in others)


def test_numbers_of_appendix_a_stand_in_the_recipe_of_the_vae():
    values = parse("vae_256px.yaml")
    paper = {"max_steps": 1_000_000, "discriminator_start_step": 50_000, "perceptual_weight": 1.0}
    paper |= {"adversarial_weight": 0.5, "identity_weight": 0.2, "latent_weight": 1e-6}
    assert {name: values[name] for name in paper} == paper
    assert values["perceptual_model"] and values["identity_model"]
    arguments, *_ = parse_recipe(*VAE_ARGUMENTS, argv=["--config", str(ROOT / "recipes/configs/vae_256px.yaml")])
    with torch.device("meta"):
        vae = build_image_tokenizer(arguments)
    assert find_latent_shape(vae, arguments.image_size) == (8, 32, 32)
    for size in SIZES:  # whose files say what the autoencoder is to be
        told = AutoConfig.from_pretrained(ROOT / f"recipes/configs/models/transfusion_{size}.json").vae_config
        assert json.loads(json.dumps({name: vae.config[name] for name in told})) == told
    assert sum(weight.numel() for weight in vae.parameters()) / 1e6 == pytest.approx(86, rel=0.03)


@pytest.mark.parametrize(("name", "millions"), [("tiny", (0.8, 1.2)), ("icons", (8, 11.5))])
def test_small_models_are_as_large_as_their_recipes_say(name, millions):
    config = AutoConfig.from_pretrained(ROOT / f"recipes/configs/models/transfusion_{name}.json")
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config)
    assert millions[0] < sum(weight.numel() for weight in model.parameters()) / 1e6 < millions[1]


SHORT = "--max_steps 2 --warmup_steps 1 --per_device_train_batch_size 3 --report_to none".split()


def test_the_tiny_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [f"--output_dir={tmp_path}", *"--num_scenes 9 --num_eval_documents 2 --num_samples 1".split(), *SHORT]
    folder = pretrain.main(["--config=recipes/configs/transfusion_tiny_pretrain.yaml", *words])
    assert (folder / "samples.png").exists() and (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_the_recipes_of_icons_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    vae, decoder, latents = (f"{tmp_path}/{name}" for name in ("vae", "decoder", "latents"))
    scenes, own = "--num_scenes 23".split(), ["--image_tokenizer_name", decoder]
    words = [*scenes, *"--num_scale_images 8".split(), *SHORT]
    train_image_tokenizer.main(["--config=recipes/configs/vae_64px.yaml", f"--output_dir={vae}", *words])
    words += [f"--output_dir={decoder}", "--model_name_or_path", vae]
    train_image_tokenizer.main(["--config=recipes/configs/vae_64px_decoder.yaml", *words])
    words = [
        f"--output_dir={latents}",
        *scenes,
        *"--dataset_name icon_scenes:icons --image_size 64 --patch_size 4".split(),
    ]
    encode_images.main([*words, *own])
    words = ["--dataset_name", latents, *"--torch_compile false".split(), *SHORT]
    samples = "--num_eval_documents 2 --num_samples 1".split()
    config = "--config=recipes/configs/transfusion_icons_pretrain.yaml"
    base = pretrain.main([config, f"--output_dir={tmp_path}/base", *own, *words, *samples])
    assert (base / "samples.png").exists() and (base / "model.safetensors").exists()
    start = [f"--output_dir={tmp_path}/means", "--model_name_or_path", str(base)]
    means = pretrain.main(["--config=recipes/configs/transfusion_icons_means.yaml", *start, *words, *samples])
    tasks = "--num_task_scenes 20 --num_eval_rows 2 --num_samples 1 --reports_start false --eval_steps 2".split()
    start = [f"--output_dir={tmp_path}/tuned", "--model_name_or_path", str(means)]
    tuned = sft.main(["--config=recipes/configs/transfusion_icons_sft.yaml", *start, *words, *tasks])
    assert "step 2" in (tuned / "tasks.md").read_text() and (tuned / "model.safetensors").exists()
    better = ["--trains_decoder_only=true", f"--model_name_or_path={decoder}", f"--output_dir={tmp_path}/better"]
    words_of_decoder = [*scenes, *"--num_scale_images 8 --exact_share 0.75".split(), *SHORT]
    train_image_tokenizer.main(["--config=recipes/configs/vae_64px_decoder.yaml", *words_of_decoder, *better])
    start = [f"--output_dir={tmp_path}/exact", "--model_name_or_path", str(tuned)]
    start += ["--image_tokenizer_name", f"{tmp_path}/better"]
    exact = sft.main(["--config=recipes/configs/transfusion_icons_exact_sft.yaml", *start, *words, *tasks])
    assert (exact / "model.safetensors").exists()


def test_an_override_of_the_patch_size_changes_what_follows_from_it():
    config = load_config(ModelArguments(preset="0.16B", config_overrides="patch_size=4,patch_layer=unet"))
    assert config.patch_layer == "unet" and len(config.unet_block_out_channels) == 3
    assert config.text_config.hidden_size == 768
    tiny = ROOT / "recipes/configs/models/transfusion_tiny.json"
    config = load_config(ModelArguments(config_name=str(tiny), config_overrides="diffusion_loss_weight=3.0"))
    assert config.diffusion_loss_weight == 3.0 and config.patch_positions == "rotary" and config.image_size == 32


@pytest.mark.parametrize("overrides", ["patch_size", "=", "a=b", "patch_size=4,", "patch_size=big", "vae_stride=2"])
def test_overrides_that_change_nothing_are_refused_by_name(overrides):
    with pytest.raises(ValueError, match="`config_overrides`"):
        load_config(ModelArguments(preset="0.16B", config_overrides=overrides))


@pytest.mark.parametrize(
    "text", ["null", "[]", "3", '{"model_type": ["cm3leon"]}', '{"model_type": "cm3leon", "dtype": ""}']
)
def test_a_file_that_holds_no_configuration_is_refused_by_name(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match="mine.json|configuration"):
        load_config(ModelArguments(config_name=str(tmp_path / "mine.json")))
