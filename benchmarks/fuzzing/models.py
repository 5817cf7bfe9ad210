"""Models of one layer of both families, with their pipelines: as small as their doors allow."""

from pathlib import Path

import torch

from hf_mm.cm3leon import (
    CM3LeonConfig,
    CM3LeonForConditionalGeneration,
    CM3LeonPipeline,
    CM3LeonProcessor,
    extend_tokenizer,
)
from hf_mm.data.text_tokenizer import train_text_tokenizer
from hf_mm.transfusion import (
    TransfusionConfig,
    TransfusionForConditionalGeneration,
    TransfusionPipeline,
    TransfusionProcessor,
)

from .values import WORDS


NUM_CODES, NUM_SENTINELS, VOCAB_SIZE = 23, 7, 290
MAX_POSITIONS = 160
TOWER = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
BLOCKS = {
    "block_out_channels": [4, 6],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 3,
    "sample_size": 8,
}


def build_transfusion(**fields: object) -> TransfusionPipeline:
    """Builds a Transfusion of one layer that draws 8 x 8 pixels in 16 patches."""
    tokenizer = train_text_tokenizer(WORDS * 2, VOCAB_SIZE)
    config = TransfusionConfig(
        text_config={"model_type": "llama", "max_position_embeddings": MAX_POSITIONS, **TOWER},
        image_size=8,
        num_inference_steps=2,
        boi_token_id=3,
        eoi_token_id=4,
        image_token_id=5,
        **fields,
    )
    config.set_tokenizer(tokenizer)
    torch.manual_seed(0)
    model = TransfusionForConditionalGeneration(config).eval()
    return TransfusionPipeline(model, TransfusionProcessor.from_config(config, tokenizer), model.default_scheduler())


def build_cm3leon() -> CM3LeonPipeline:
    """Builds a CM3Leon of one layer that draws 8 x 8 pixels in 16 codes."""
    tokenizer = extend_tokenizer(train_text_tokenizer(WORDS * 2, VOCAB_SIZE), NUM_CODES, NUM_SENTINELS)
    config = CM3LeonConfig(
        image_size=8,
        image_vocab_size=NUM_CODES,
        num_sentinel_tokens=NUM_SENTINELS,
        max_position_embeddings=MAX_POSITIONS,
        vq_config={**BLOCKS, "num_vq_embeddings": NUM_CODES},
        **TOWER,
    )
    config.set_tokenizer(tokenizer)
    torch.manual_seed(0)
    model = CM3LeonForConditionalGeneration(config).eval()
    return CM3LeonPipeline(model, CM3LeonProcessor.from_config(config, tokenizer))


def build_pipelines() -> dict[str, TransfusionPipeline | CM3LeonPipeline]:
    """Builds the pipelines of both families by name, silent."""
    pipelines = {"transfusion": build_transfusion(), "cm3leon": build_cm3leon()}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def save_pipelines(folder: Path) -> list[Path]:
    """Saves both families, and a Transfusion with an image tokenizer and a U-Net, each in a folder of its own."""
    vae = {**BLOCKS, "scaling_factor": 0.7, "shift_factor": 0.3}
    unet = {"unet_block_out_channels": [4, 6], "unet_norm_num_groups": 2, "unet_layers_per_block": 1}
    pipelines = {**build_pipelines(), "transfusion_vae": build_transfusion(vae_config=vae, patch_layer="unet", **unet)}
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    return [folder / name for name in pipelines]
