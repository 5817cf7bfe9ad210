import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonForConditionalGeneration, CM3LeonProcessor, extend_tokenizer
from hf_mm.data.text_tokenizer import end_captions, train_text_tokenizer
from hf_mm.transfusion import TransfusionConfig, TransfusionForConditionalGeneration, TransfusionProcessor


torch.set_num_threads(1)

TEXTS = ["a red star on a white background", "two blue boxes left of a green moon", "an orange kite"] * 2

# Wide initial weights, so that every input has a visible effect on every output that depends on it.
SPREAD = 0.4

TINY_VAE = {
    "block_out_channels": [2, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 5,
    "scaling_factor": 0.7,
    "shift_factor": 0.3,
    "sample_size": 16,
}

NUM_CODES, NUM_SENTINELS = 23, 7

TINY_VQ = {
    "block_out_channels": [4, 6],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 3,
    "num_vq_embeddings": NUM_CODES,
    "sample_size": 8,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """Accelerate keeps the precision that a process began with; `auto` takes the one that this machine is fast in."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def fresh_compiler():
    """What dynamo keeps of other models of this process counts towards its limit, and tells it which sizes change."""
    torch.compiler.reset()


@pytest.fixture(scope="session")
def tokenizer():
    return train_text_tokenizer(TEXTS, vocab_size=311)


@pytest.fixture(scope="session")
def tiny_vae():
    return dict(TINY_VAE)


@pytest.fixture(scope="session")
def make_config(tokenizer):
    """Configurations of a model of a few thousand parameters, changed by keyword."""

    def make(**fields):
        text_config = {
            "model_type": "llama",
            "hidden_size": 20,
            "intermediate_size": 28,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "initializer_range": SPREAD,
            **fields.pop("text_config", {}),
        }
        fields = {"image_size": 8, "num_inference_steps": 3, "drawing_guidance_scale": 2.5, **fields}
        if fields.get("patch_layer") == "unet":
            widths = [4, 6, 8, 10][: fields.get("patch_size", 2).bit_length()]
            fields = {
                "unet_block_out_channels": widths,
                "unet_norm_num_groups": 2,
                "unet_layers_per_block": 1,
                **fields,
            }
        config = TransfusionConfig(
            text_config=text_config,
            boi_token_id=3,
            eoi_token_id=4,
            image_token_id=5,
            initializer_range=SPREAD,
            **fields,
        )
        config.set_tokenizer(tokenizer)
        return config

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """Seeded models in evaluation mode, changed by keyword."""

    def make(**fields):
        torch.manual_seed(7)
        attention = fields.pop("attn_implementation", "sdpa")
        config = make_config(**fields)
        return TransfusionForConditionalGeneration._from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture(scope="session")
def make_processor(tokenizer):
    def make(config):
        return TransfusionProcessor.from_config(config, tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_vq():
    return dict(TINY_VQ)


@pytest.fixture(scope="session")
def code_tokenizer(tokenizer):
    """The text tokenizer with codes, sentinels and the delimiters of CM3Leon."""
    return extend_tokenizer(tokenizer, NUM_CODES, NUM_SENTINELS)


@pytest.fixture(scope="session")
def make_cm3leon_config(code_tokenizer):
    """Configurations of a CM3Leon of a few thousand parameters and 4 x 4 codes per picture, changed by keyword."""

    def make(**fields):
        fields = {
            "hidden_size": 20,
            "intermediate_size": 28,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": SPREAD,
            "position_initializer_range": SPREAD,
            "image_size": 8,
            "image_vocab_size": NUM_CODES,
            "num_sentinel_tokens": NUM_SENTINELS,
            "vq_config": dict(TINY_VQ),
            **fields,
        }
        config = CM3LeonConfig(**fields)
        config.set_tokenizer(code_tokenizer)
        return config

    return make


@pytest.fixture(scope="session")
def make_cm3leon(make_cm3leon_config):
    """Seeded CM3Leon models in evaluation mode, changed by keyword, whose every layer is heard."""

    def make(**fields):
        torch.manual_seed(7)
        attention = fields.pop("attn_implementation", "sdpa")
        config = make_cm3leon_config(**fields)
        model = CM3LeonForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
        for layer in model.model.layers:  # zero at the beginning, when layers have no effect yet
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                torch.nn.init.normal_(weight, std=SPREAD)
        if model.image_tokenizer is not None:  # entries that pictures of noise have, so that they use many codes
            with torch.no_grad():
                latents = model.image_tokenizer.encode(torch.rand(2, 3, 8, 8) * 2 - 1).latents
                vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)[:NUM_CODES]
                model.image_tokenizer.quantize.embedding.weight.copy_(vectors)
        return model

    return make


@pytest.fixture(scope="session")
def make_cm3leon_processor(code_tokenizer):
    def make(config):
        return CM3LeonProcessor.from_config(config, code_tokenizer)

    return make


@pytest.fixture(scope="session")
def lay_out():
    """Rows of ids from parts: an integer is a text token, a pair the latent size of an image."""

    def lay(config, *parts):
        ids = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                count = part[0] * part[1] // config.patch_size**2
                ids += [config.boi_token_id, *[config.image_token_id] * count, config.eoi_token_id]
        return ids

    return lay


@pytest.fixture(scope="session")
def picture():
    """Pictures of noise, different by seed."""

    def draw(seed=0, height=11, width=13, mode="RGB"):
        values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
        return Image.fromarray(values, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(values)

    return draw


@pytest.fixture(scope="session")
def clip_dir(tokenizer, tmp_path_factory):
    """A CLIP of random weights that tells inputs apart, saved with its processor; its vectors have 19 numbers."""
    folder = tmp_path_factory.mktemp("clip")
    ending = end_captions(tokenizer, 29)
    ids = {name: getattr(ending, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {**tower, **ids, "vocab_size": len(ending), "max_position_embeddings": 29}
    vision = {**tower, "image_size": 12, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=19))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, SPREAD)
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    CLIPProcessor(image_processor, ending).save_pretrained(folder)
    return folder
