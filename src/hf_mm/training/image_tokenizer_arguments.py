"""The fields of an image tokenizer's training, and what is built from them. Knows no data."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, VQModel

from .image_tokenizer import ImageTokenizerTrainer, ImageTokenizerWeights, PatchDiscriminator, load_feature_distance
from .image_tokenizer_codecs import KLCodec, VQCodec, freeze_encoder


@dataclass
class ImageTokenizerArguments:
    """The tokenizer, and what its loss is made of."""

    image_tokenizer_class: Literal["AutoencoderKL", "VQModel"] = field(
        default="AutoencoderKL", metadata={"help": "Latents that are continuous, or codes."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer to train further."})
    image_size: int = field(default=64, metadata={"help": "Pixels of a side; pictures are cropped and resized."})
    latent_channels: int = field(default=4, metadata={"help": "Channels of the latent."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 64],
        metadata={"help": "Channels per level; each level but one halves the size."},
    )
    layers_per_block: int = field(default=1, metadata={"help": "Residual blocks per level."})
    norm_num_groups: int = field(default=8, metadata={"help": "Groups of the norms; divides every level's channels."})
    mid_block_add_attention: bool = field(default=True, metadata={"help": "Attention at the smallest size."})
    num_vq_embeddings: int = field(default=8192, metadata={"help": "Codes of a VQModel."})
    vq_embed_dim: int | None = field(default=None, metadata={"help": "Length of a code; none: latent_channels."})
    trains_decoder_only: bool = field(
        default=False,
        metadata={"help": "Latents, or codes, stay as they are, so that models trained on them stay valid."},
    )
    latent_noise_scale: float = field(
        default=1.0,
        metadata={
            "help": "Share of the posterior's noise that is added to its mean before decoding, 0 to 1. Small where a "
            "model learns means of latents (`samples_latents` false): its decoder need not see through noise."
        },
    )
    latent_weight: float = field(default=1e-6, metadata={"help": "Weight of the KL, summed over the latent."})
    codebook_weight: float = field(default=1.0, metadata={"help": "Weight of codebook and commitment of a VQModel."})
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight of the commitment within it."})
    local_codes: bool = field(
        default=False, metadata={"help": "Codes of a VQModel learn from the pixels under them alone."}
    )
    code_revival_steps: int | None = field(
        default=200, metadata={"help": "Every so many steps usage is logged, and codes not used since are drawn anew."}
    )
    quantization_start_step: int = field(
        default=0, metadata={"help": "Step, a multiple of code_revival_steps, until which latents pass as they are."}
    )
    last_code_revival_step: int | None = field(
        default=None, metadata={"help": "From the step after it on usage is logged only; none: never."}
    )
    num_revival_images: int = field(default=64, metadata={"help": "Pictures of whose latents codes are drawn."})
    adversarial_weight: float = field(default=0.5, metadata={"help": "Weight of the generator's loss."})
    discriminator_start_step: int | None = field(default=None, metadata={"help": "First step with it; none: never."})
    discriminator_channels: int = field(default=64, metadata={"help": "Width of the discriminator's first layer."})
    discriminator_layers: int = field(default=3, metadata={"help": "Its layers with stride 2."})
    perceptual_model: str | None = field(default=None, metadata={"help": "Backbone of transformers for LPIPS."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of that distance."})
    identity_model: str | None = field(default=None, metadata={"help": "Backbone of transformers for the ID loss."})
    identity_weight: float = field(default=0.2, metadata={"help": "Weight of that distance."})
    num_scale_images: int = field(default=512, metadata={"help": "Pictures the scale or the usage is measured on."})

    def __post_init__(self) -> None:
        """Refuses fields that do not fit together."""
        if bad := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            raise ValueError(f"`norm_num_groups`={self.norm_num_groups} does not divide `block_out_channels` {bad}.")
        if self.local_codes and self.image_tokenizer_class != "VQModel":
            raise ValueError(
                f"`local_codes`=True needs codes, which `image_tokenizer_class`={self.image_tokenizer_class} has not. "
                "Set it to VQModel, or leave `local_codes` out."
            )
        if not 0 <= self.latent_noise_scale <= 1:
            raise ValueError(f"`latent_noise_scale`={self.latent_noise_scale} must be at least 0 and at most 1.")
        if self.image_tokenizer_class == "VQModel" and self.latent_noise_scale != 1:
            raise ValueError(
                f"`latent_noise_scale`={self.latent_noise_scale} is for an AutoencoderKL: codes have no noise. Set 1."
            )
        start, period = self.quantization_start_step, self.code_revival_steps
        if start and self.image_tokenizer_class == "VQModel" and self.model_name_or_path is not None:
            raise ValueError(
                f"`quantization_start_step`={start} would draw all codes of `model_name_or_path`="
                f"{self.model_name_or_path!r} anew. Set it to 0."
            )
        if self.trains_decoder_only:
            self._refuse_what_changes_codes()
        if start % (period or start + 1):
            raise ValueError(f"`quantization_start_step`={start} must be a multiple of `code_revival_steps`={period}.")

    def _refuse_what_changes_codes(self) -> None:
        """Refuses fields under which a decoder could not be trained alone."""
        if self.model_name_or_path is None:
            raise ValueError("`trains_decoder_only`=True needs `model_name_or_path`, whose decoder it trains.")
        if self.local_codes:
            raise ValueError("`local_codes`=True trains codes, which `trains_decoder_only`=True keeps. Unset one.")
        if self.image_tokenizer_class == "VQModel" and self.code_revival_steps is not None:
            raise ValueError(
                f"`code_revival_steps`={self.code_revival_steps} draws codes anew, and `trains_decoder_only`=True "
                "keeps them. Set it to none."
            )


def build_image_tokenizer(arguments: ImageTokenizerArguments) -> AutoencoderKL | VQModel:
    """Loads or makes the tokenizer; another class of tokenizer is one more entry here, with a codec of its own."""
    classes = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    kind: Any = classes[arguments.image_tokenizer_class]
    if arguments.model_name_or_path is not None:
        config = kind.load_config(arguments.model_name_or_path)
        if (found := config["_class_name"]) != arguments.image_tokenizer_class:
            raise ValueError(
                f"`model_name_or_path`={arguments.model_name_or_path} is of class {found}. Set "
                f"`image_tokenizer_class`={found}, or name an {arguments.image_tokenizer_class}."
            )
        if arguments.trains_decoder_only and kind is AutoencoderKL and config.get("scaling_factor") is None:
            raise ValueError(
                f"`model_name_or_path`={arguments.model_name_or_path} has no `scaling_factor`, which models of its "
                "latents rely on. Name the folder `image_tokenizer` that recipes/encode_images.py left with the rows."
            )
        return kind.from_pretrained(arguments.model_name_or_path, use_safetensors=True)
    num_levels = len(arguments.block_out_channels)
    own = {"num_vq_embeddings": arguments.num_vq_embeddings, "vq_embed_dim": arguments.vq_embed_dim}
    return kind(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=tuple(arguments.block_out_channels),
        layers_per_block=arguments.layers_per_block,
        latent_channels=arguments.latent_channels,
        norm_num_groups=arguments.norm_num_groups,
        sample_size=arguments.image_size,
        mid_block_add_attention=arguments.mid_block_add_attention,
        **(own if kind is VQModel else {}),
    )


def find_latent_shape(tokenizer: AutoencoderKL | VQModel, image_size: int) -> tuple[int, int, int]:
    """Returns channels, height and width of the latent of a picture.

    Raises:
        ValueError: If the picture's size is no multiple of the tokenizer's stride.
    """
    stride = 2 ** (len(tokenizer.config.block_out_channels) - 1)
    if image_size % stride:
        raise ValueError(
            f"`image_size`={image_size} must be a multiple of {stride}, the stride of "
            f"{len(tokenizer.config.block_out_channels)} `block_out_channels`. Try {image_size // stride * stride}."
        )
    return tokenizer.config.latent_channels, image_size // stride, image_size // stride


def build_trainer(arguments: ImageTokenizerArguments, tokenizer: AutoencoderKL | VQModel) -> ImageTokenizerTrainer:
    """Joins the tokenizer with its discriminator and the feature networks that the recipe names."""
    names = {"perceptual_distance": arguments.perceptual_model, "identity_distance": arguments.identity_model}
    codec: KLCodec | VQCodec
    if arguments.trains_decoder_only:
        freeze_encoder(tokenizer)
    if isinstance(tokenizer, VQModel):
        codec = VQCodec(tokenizer, arguments.commitment_weight, local_codes=arguments.local_codes)
        latent_weight = arguments.codebook_weight
    else:
        codec, latent_weight = KLCodec(tokenizer, arguments.latent_noise_scale), arguments.latent_weight
    return ImageTokenizerTrainer(
        codec,
        PatchDiscriminator(arguments.discriminator_channels, arguments.discriminator_layers),
        ImageTokenizerWeights(latent_weight, arguments.perceptual_weight, arguments.identity_weight),
        **{key: None if name is None else load_feature_distance(name) for key, name in names.items()},
    )


def add_adversary(
    batches: Iterator[Any], arguments: ImageTokenizerArguments, first_step: int, batches_per_step: int
) -> Iterator[Any]:
    """Puts the generator's weight into the batches from its first step on; `first_step` steps are done already."""
    start = arguments.discriminator_start_step
    for number, batch in enumerate(batches, start=first_step * batches_per_step):
        if start is not None and number // batches_per_step + 1 >= start:
            batch["adversarial_weight"] = torch.tensor(arguments.adversarial_weight)
        yield batch
