import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration
from hf_mm.transfusion.configuration_transfusion import PRESETS
from hf_mm.transfusion.patching_transfusion import build_patch_layers


PAPER_VAE = {"latent_channels": 8, "block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.2}
TEXT_PARAMETERS = {"0.16B": 162e6, "0.37B": 374e6, "0.76B": 778e6, "1.4B": 1364e6, "7B": 6738e6}
LINEAR_OVERHEAD_PERCENT = {"0.16B": 0.5, "0.37B": 0.4, "0.76B": 0.4, "1.4B": 0.4, "7B": 0.3}  # table 7


def count(*modules):
    return sum(weight.numel() for module in modules for weight in module.parameters())


def patch_layer_parameters(preset, **fields):
    with torch.device("meta"):
        return count(*build_patch_layers(TransfusionConfig.from_preset(preset, vae_config=PAPER_VAE, **fields)))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_have_the_papers_sizes(preset):
    config = TransfusionConfig.from_preset(preset)
    with torch.device("meta"):
        model = TransfusionForConditionalGeneration(config)
    num_text = count(model.model.language_model, model.lm_head)
    assert abs(num_text / TEXT_PARAMETERS[preset] - 1) < 0.01
    assert config.text_config.max_position_embeddings == 4096
    overhead = patch_layer_parameters(preset) / num_text
    assert round(100 * overhead, 1) == LINEAR_OVERHEAD_PERCENT[preset]


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("preset", ["0.16B", "0.76B", "7B"])
def test_the_unet_adds_about_a_quarter_of_a_billion_parameters(preset, patch_size):
    assert abs(patch_layer_parameters(preset, patch_layer="unet", patch_size=patch_size) / 0.265e9 - 1) < 0.03


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="0.17B.*0.16B"):
        TransfusionConfig.from_preset("0.17B")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prediction_type": "sample"}, "prediction_type.*sample.*flow_prediction"),
        ({"patch_layer": "conv"}, "patch_layer.*conv"),
        ({"patch_size": 3}, "patch_size.*3"),
        ({"image_attention": "full"}, "image_attention.*full"),
        ({"patch_positions": "rows"}, "patch_positions.*rows.*running.*grid.*rotary"),
        ({"patch_positions": "rotary", "text_config": {"model_type": "llama", "head_dim": 6}}, "rotary.*8 wide.*6"),
        ({"timestep_sampling": "normal"}, "timestep_sampling.*normal"),
        ({"patch_layer": "unet", "unet_block_out_channels": [8]}, "unet_block_out_channels"),
        ({"image_size": 13}, "image_size.*13.*2 pixels"),
        (
            {
                "image_size": 12,
                "vae_config": {"latent_channels": 4, "block_out_channels": [1, 1, 1], "scaling_factor": 1},
            },
            "8 pixels",
        ),
        ({"vae_config": {"latent_channels": 4, "block_out_channels": [1, 1, 1]}}, "vae_config.*scaling_factor"),
        ({"drawing_guidance_scale": 0.5}, "drawing_guidance_scale.*0.5"),
        ({"image_token_id": 99999}, "image_token_id.*99999"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps.*1000000000.*at most 1000000"),
    ],
)
def test_fields_out_of_range_are_refused_by_name(fields, match):
    with pytest.raises(StrictDataclassClassValidationError, match=match):
        TransfusionConfig(**fields)


def test_a_trunk_without_heads_is_refused_before_the_library_divides_by_them():
    with pytest.raises(ValueError, match="text_config.num_attention_heads.*=0 must be at least 1"):
        TransfusionConfig(text_config={"model_type": "llama", "num_attention_heads": 0})


def test_a_configuration_survives_saving(make_config, tmp_path, tiny_vae):
    config = make_config(vae_config=tiny_vae, patch_layer="unet", patch_size=4, prediction_type="v_prediction")
    config.save_pretrained(tmp_path)
    for again in (TransfusionConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(again, TransfusionConfig)
        assert again.to_diff_dict() == config.to_diff_dict()
        assert again.vae_stride == 2 and again.image_stride == 8 and again.latent_channels == 5


def test_another_familys_configuration_is_refused(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type.*'llama'"):
        TransfusionConfig.from_pretrained(tmp_path)


def test_token_ids_and_vocabulary_come_from_the_tokenizer(make_config, tokenizer):
    config = TransfusionConfig()
    config.set_tokenizer(tokenizer)
    assert config.text_config.vocab_size == len(tokenizer)
    for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config.text_config, name) == getattr(tokenizer, name)


def test_copies_do_not_share_their_text_configuration(make_config):
    config = make_config()
    other = copy.deepcopy(config)
    other.text_config.vocab_size = 1000
    assert config.text_config.vocab_size != 1000
