import copy

import pytest
import torch
from diffusers import VQModel
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonForConditionalGeneration, extend_tokenizer
from hf_mm.cm3leon.configuration_cm3leon import PRESETS


# Layers, width and heads, then millions of parameters in the layers and in the tied embedding.
PAPER = {"350M": (24, 1024, 16, 302, 58), "760M": (24, 1536, 16, 680, 87), "7B": (32, 4096, 32, 6442, 231)}


def count(*modules):
    return sum(weight.numel() for module in modules for weight in module.parameters())


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_have_the_papers_sizes(preset):
    layers, width, heads, in_layers, in_embedding = PAPER[preset]
    config = CM3LeonConfig.from_preset(preset)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert config.intermediate_size == 4 * width and config.max_position_embeddings == 4096
    assert config.vocab_size == 56320 and config.image_vocab_size == 8192 and config.tokens_per_image == 1024
    with torch.device("meta"):
        model = CM3LeonForConditionalGeneration(config)
    assert abs(count(model.model.layers) / 1e6 - in_layers) < 1
    assert abs(count(model.model.embed_tokens) / 1e6 - in_embedding) < 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count(model) == 12 * layers * width**2 + (56320 + 4096) * width


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="340M.*350M.*760M.*7B"):
        CM3LeonConfig.from_preset("340M")


def test_a_preset_takes_other_fields():
    config = CM3LeonConfig.from_preset("760M", num_hidden_layers=5, image_size=128)
    assert (config.num_hidden_layers, config.hidden_size, config.tokens_per_image) == (5, 1536, 256)


def test_the_default_vocabulary_is_text_then_codes_then_specials_without_a_gap():
    config = CM3LeonConfig()
    specials = [config.break_token_id, config.eoss_token_id, config.image_token_id]
    sentinels = [config.first_sentinel_token_id + number for number in range(config.num_sentinel_tokens)]
    assert [*config.image_token_ids, *specials, *sentinels] == list(range(47613, 56320))
    assert config.get_text_config() is config


VQ = {"num_vq_embeddings": 8192, "block_out_channels": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size.*100.*num_attention_heads.*3"),
        ({"image_size": 100}, "image_size.*100.*8 pixels"),
        ({"image_size": 4}, "image_size.*4.*8 pixels"),
        ({"image_size": 30, "vq_config": {**VQ, "block_out_channels": [1, 1, 1]}}, "image_size.*30.*4 pixels"),
        ({"max_position_embeddings": 1026}, "max_position_embeddings.*1026.*1024 codes.*1027"),
        ({"image_positions": "rows"}, "image_positions.*rows.*running.*grid.*rotary"),
        ({"image_vocab_size": 10**30}, "image_vocab_size.*10{30} ids from"),
        ({"drawing_temperature": 0}, "drawing_temperature.*0.*above 0"),
        ({"drawing_guidance_scale": 0.5}, "drawing_guidance_scale.*0.5"),
        ({"vq_config": {**VQ, "num_vq_embeddings": 512}}, "image_vocab_size.*8192.*codebook, 512"),
        ({"image_vocab_size": 8193, "vq_config": VQ}, "image_vocab_size.*8193.*codebook, 8192"),
        ({"vocab_size": 56319}, "num_sentinel_tokens.*512.*55808.*56319"),
        ({"first_image_token_id": -1}, "image_vocab_size.*8192.*-1"),
        ({"first_image_token_id": 48127, "break_token_id": 3}, "first_sentinel_token_id.*55808.*overlap.*48127"),
        ({"break_token_id": 56320}, "break_token_id.*56320"),
        ({"eoss_token_id": 47613}, "eoss_token_id.*47613"),
        ({"image_token_id": 56319}, "image_token_id.*56319"),
        ({"eos_token_id": [1, 2]}, "eos_token_id.*one id"),
        ({"pad_token_id": None}, "pad_token_id.*None"),
    ],
)
def test_fields_that_do_not_fit_are_refused_by_name(fields, match):
    with pytest.raises(StrictDataclassClassValidationError, match=match):
        CM3LeonConfig(**fields)


def test_a_configuration_survives_saving(make_config, tmp_path):
    config = make_config(drawing_guidance_scale=4, hidden_act="gelu")
    config.save_pretrained(tmp_path)
    for again in (CM3LeonConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(again, CM3LeonConfig)
        assert again.to_diff_dict() == config.to_diff_dict()
        assert again.vq_stride == 2 and again.tokens_per_image == 16
        assert again.first_image_token_id == config.first_image_token_id != CM3LeonConfig().first_image_token_id


def test_another_familys_configuration_is_refused(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type.*'llama'"):
        CM3LeonConfig.from_pretrained(tmp_path)


def test_ids_and_vocabulary_come_from_the_tokenizer(code_tokenizer):
    config = CM3LeonConfig()
    config.set_tokenizer(code_tokenizer)
    assert config.vocab_size == len(code_tokenizer)
    assert (config.image_vocab_size, config.num_sentinel_tokens) == (23, 7)
    for name in ("break", "eoss", "image", "eos", "pad"):
        assert config.__dict__[f"{name}_token_id"] == getattr(code_tokenizer, f"{name}_token_id")
    assert code_tokenizer.convert_ids_to_tokens(list(config.image_token_ids)) == [f"<code:{n}>" for n in range(23)]
    assert code_tokenizer.convert_ids_to_tokens(config.first_sentinel_token_id + 6) == "<sentinel:6>"


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer.*break_token.*eoss_token.*<code:0>.*<sentinel:0>.*extend"):
        CM3LeonConfig().set_tokenizer(tokenizer)


def test_a_tokenizer_of_another_codebook_than_the_image_tokenizers_is_refused(make_config, tokenizer):
    with pytest.raises(ValueError, match="image_vocab_size.*29.*codebook, 23"):
        make_config().set_tokenizer(extend_tokenizer(tokenizer, 29, 7))


def test_an_image_tokenizer_brings_its_configuration_unless_its_codebook_differs(make_config, tiny_vq, tmp_path):
    VQModel(**tiny_vq).save_pretrained(tmp_path / "fits")
    VQModel(**{**tiny_vq, "num_vq_embeddings": 29}).save_pretrained(tmp_path / "differs")
    config = make_config(vq_config=None, image_size=16)
    assert config.vq_stride == 8 and config.tokens_per_image == 4
    config.set_image_tokenizer(str(tmp_path / "fits"))
    assert config.vq_stride == 2 and config.tokens_per_image == 64
    with pytest.raises(ValueError, match="image_vocab_size.*23.*codebook, 29"):
        config.set_image_tokenizer(str(tmp_path / "differs"))


def test_copies_do_not_share_their_image_tokenizers_configuration(make_config):
    config = make_config()
    other = copy.deepcopy(config)
    other.vq_config["num_vq_embeddings"] = 1000
    assert config.vq_config["num_vq_embeddings"] == 23
