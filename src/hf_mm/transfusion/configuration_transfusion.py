"""Configuration of Transfusion: a text backbone, an optional frozen VAE, and how images enter and leave.

Knows sizes and names only; nothing here touches a tensor.
"""

from typing import Any

from diffusers import AutoencoderKL
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.configuration_utils import SubConfigSpec


PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")
PATCH_LAYERS = ("linear", "unet")
IMAGE_ATTENTIONS = ("bidirectional", "causal")
PATCH_POSITIONS = ("running", "grid", "rotary")
PATCH_SIZES = (1, 2, 4, 8)

# (layers, hidden size, heads, SwiGLU hidden size). Source: Transfusion, table 2; the last column follows from Llama's
# rule (8/3 of the hidden size, rounded up to a multiple of 256) and reproduces the printed parameter counts.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "0.16B": (16, 768, 12, 2048),
    "0.37B": (24, 1024, 16, 2816),
    "0.76B": (24, 1536, 24, 4096),
    "1.4B": (24, 2048, 16, 5632),
    "7B": (32, 4096, 32, 11008),
}


# Beyond every model there is: a number of layers that is a slip of the pen is not built until memory is full.
MAX_LAYERS = 1024
MAX_TRAIN_TIMESTEPS = 1_000_000  # schedulers make a list of them

# Channels of each U-Net level by patch size. Source: Transfusion, section 4.3 (0.27B for both ways, whatever the
# backbone); the plan is ours, and gives 259M to 268M over the presets and patch sizes. The paper runs 1 without one.
UNET_BLOCK_OUT_CHANNELS: dict[int, tuple[int, ...]] = {
    1: (320,),
    2: (320, 1280),
    4: (320, 896, 896),
    8: (320, 640, 768, 768),
}


@strict
class TransfusionConfig(PreTrainedConfig):
    r"""Describes a Transfusion model: one Llama-style transformer over text tokens and continuous image patches.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Text backbone, any configuration whose `AutoModel` is a Llama-style decoder. Defaults to Llama with a
            vocabulary of 32003 entries: Llama 2's 32000 and the three image tokens below.
        vae_config (`dict`, *optional*):
            Configuration of the frozen diffusers `AutoencoderKL`, whose `scaling_factor` (and `shift_factor`) scale
            the latents. `None`: the model reads and draws raw pixels in [-1, 1], as in the paper's first experiments.
        num_channels (`int`, defaults to 3): Colour channels of a picture; the latent channels are the VAE's.
        image_size (`int`, defaults to 256): Height and width, in pixels, of a picture drawn when no size is asked for.
        patch_layer (`str`, defaults to `"linear"`):
            `"linear"`: one linear layer in and one out. `"unet"`: convolutional down and up blocks with skips.
        patch_size (`int`, defaults to 2):
            Side of the square of latent pixels that one transformer position holds; 1, 2, 4 or 8. A patch vector is
            ordered (channel, row, column), as `torch.nn.functional.pixel_unshuffle` does.
        unet_block_out_channels (`list[int]`, *optional*):
            Channels of each U-Net level, one more level than `log2(patch_size)`. Defaults to a plan per patch size
            that gives the paper's 0.27B, such as `[320, 1280]` at 2 x 2 patches.
        unet_layers_per_block (`int`, defaults to 2): Residual blocks per level on the way down (one more going up).
        unet_norm_num_groups (`int`, defaults to 32): Groups of the U-Net's group norms.
        patch_positions (`str`, defaults to `"running"`):
            `"running"`: patches have the backbone's running positions alone, as in the paper. `"grid"`: an embedding
            of row and column is added to each, which tells a small model at once what it would have to find out.
            `"rotary"`: besides, row and column take over the slower half of the backbone's rotations, so that a patch
            finds its own place in another image; for copying what an edit keeps. A Llama checkpoint's text then reads
            differently until trained.
        image_attention (`str`, defaults to `"bidirectional"`):
            Attention among the patches of one image: `"bidirectional"` or, for the ablation of table 5, `"causal"`.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the model predicts from a noised image, in diffusers' words: `"epsilon"` (the paper),
            `"v_prediction"`, or `"flow_prediction"` (noise minus image, for the flow matching schedulers).
        num_train_timesteps (`int`, defaults to 1000): Number of noise levels, at most 1,000,000; a flow's time runs
            over the same range.
        timestep_sampling (`str`, defaults to `"uniform"`):
            Law of the training timesteps: `"uniform"` or `"logit_normal"` (location 0, scale 1).
        diffusion_loss_weight (`float`, defaults to 5.0): Lambda, the weight of the image loss against the text loss.
        num_inference_steps (`int`, defaults to 250): Denoising steps of a drawing when none are asked for.
        drawing_guidance_scale (`float`, defaults to 3.0): Guidance of a drawing when none is asked for; 1 is off.
        boi_token_id (`int`, defaults to 32000): Token that opens an image, which the model itself may sample.
        eoi_token_id (`int`, defaults to 32001): Token that closes an image, appended by rule.
        image_token_id (`int`, defaults to 32002): Placeholder that stands for one patch in `input_ids`.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the normal initialisation.

    Raises:
        ValueError: If a field is out of its range or the fields do not fit each other.

    Source: Transfusion (arXiv 2408.11039), section 3, tables 2 and 5 to 8. Differs: the paper does not print the
    U-Net's channel plan, the law of the timesteps or the latent scale; ours are the defaults above.

    Example:
        >>> config = TransfusionConfig.from_preset("0.16B", patch_layer="unet")
        >>> config.text_config.hidden_size, config.unet_block_out_channels
        (768, [320, 1280])

    """

    model_type = "transfusion"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32003})
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vae_config: dict | None = None
    num_channels: int = 3
    image_size: int = 256
    patch_layer: str = "linear"
    patch_size: int = 2
    unet_block_out_channels: list[int] | None = None
    unet_layers_per_block: int = 2
    unet_norm_num_groups: int = 32
    patch_positions: str = "running"
    image_attention: str = "bidirectional"
    prediction_type: str = "epsilon"
    num_train_timesteps: int = 1000
    timestep_sampling: str = "uniform"
    diffusion_loss_weight: float | int = 5.0
    num_inference_steps: int = 250
    drawing_guidance_scale: float | int = 3.0
    boi_token_id: int = 32000
    eoi_token_id: int = 32001
    image_token_id: int = 32002
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.unet_block_out_channels is None:
            self.unet_block_out_channels = list(UNET_BLOCK_OUT_CHANNELS.get(self.patch_size, ()))
        if isinstance(self.text_config, dict) and self.text_config.get("num_attention_heads") == 0:
            raise ValueError("`text_config.num_attention_heads`=0 must be at least 1.")  # before Llama divides by it
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    def validate_architecture(self) -> None:
        """Refuses fields out of range; part of the `@strict` validation."""
        check_image_tokenizer("vae_config", self.vae_config)
        for name in (
            "num_channels",
            "image_size",
            "num_train_timesteps",
            "num_inference_steps",
            "unet_layers_per_block",
        ):
            if (value := self.__dict__[name]) < 1:
                raise ValueError(f"`{name}`={value} must be at least 1.")
        if self.num_train_timesteps > MAX_TRAIN_TIMESTEPS:
            raise ValueError(
                f"`num_train_timesteps`={self.num_train_timesteps} must be at most {MAX_TRAIN_TIMESTEPS}."
            )
        layers = {"unet_layers_per_block": self.unet_layers_per_block}
        layers["text_config.num_hidden_layers"] = self.text_config.num_hidden_layers
        for name, value in layers.items():
            if value > MAX_LAYERS:
                raise ValueError(f"`{name}`={value} must be at most {MAX_LAYERS}.")
        choices = {
            "patch_layer": PATCH_LAYERS,
            "patch_size": PATCH_SIZES,
            "patch_positions": PATCH_POSITIONS,
            "image_attention": IMAGE_ATTENTIONS,
            "prediction_type": PREDICTION_TYPES,
            "timestep_sampling": TIMESTEP_SAMPLINGS,
        }
        for name, allowed in choices.items():
            if (value := self.__dict__[name]) not in allowed:
                raise ValueError(f"`{name}`={value!r} is not one of {allowed}.")
        if self.vae_config is not None and self.vae_config.get("scaling_factor") is None:
            raise ValueError(
                "`vae_config` has no `scaling_factor`, and the model needs latents of unit variance. "
                "recipes/encode_images.py measures it and keeps a copy of the autoencoder with it."
            )
        head_dim = getattr(self.text_config, "head_dim", None)
        head_dim = head_dim or self.text_config.hidden_size // self.text_config.num_attention_heads
        if self.patch_positions == "rotary" and head_dim < 8:
            raise ValueError(f"`patch_positions`='rotary' needs heads at least 8 wide; these are {head_dim}.")
        levels = self.patch_size.bit_length()
        if self.patch_layer == "unet" and len(self.unet_block_out_channels) != levels:
            raise ValueError(
                f"`unet_block_out_channels`={self.unet_block_out_channels} must name {levels} levels for "
                f"`patch_size`={self.patch_size}: each level but the last halves the image once."
            )
        if self.image_size % self.image_stride:
            raise ValueError(f"`image_size`={self.image_size} must be a multiple of {self.image_stride} pixels.")
        if self.drawing_guidance_scale < 1:
            raise ValueError(
                f"`drawing_guidance_scale`={self.drawing_guidance_scale} is below 1. Use 1 for no guidance."
            )
        for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
            if not 0 <= (value := self.__dict__[name]) < self.text_config.vocab_size:
                raise ValueError(f"`{name}`={value} lies outside the vocabulary of {self.text_config.vocab_size}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration that was saved; refuses another family's, which would fill up with defaults."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"A configuration is a JSON object of fields, and this is {config_dict!r}.")
        if (family := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"`model_type`={family!r} is not {cls.model_type!r}: this checkpoint is of another family. A Llama "
                "checkpoint is started from with `TransfusionForConditionalGeneration.from_llama`."
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"The configuration has a field of the wrong type ({type(error).__name__}: {error}): {config_dict!r}."
            ) from error

    @property
    def vae_stride(self) -> int:
        """Pixels per latent pixel; 1 where the model works on raw pixels."""
        return 1 if self.vae_config is None else 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def image_stride(self) -> int:
        """Pixels that every side of a picture must be a multiple of: VAE factor times patch size."""
        return self.vae_stride * self.patch_size

    @property
    def latent_channels(self) -> int:
        """Channels of a latent image (of the picture itself where there is no VAE)."""
        return self.num_channels if self.vae_config is None else self.vae_config["latent_channels"]

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the vocabulary size and all token ids from a tokenizer with the image tokens."""
        self.text_config.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.text_config, name, getattr(tokenizer, name))
        self.boi_token_id = tokenizer.boi_token_id
        self.eoi_token_id = tokenizer.eoi_token_id
        self.image_token_id = tokenizer.image_token_id
        self.validate_architecture()

    def set_image_tokenizer(self, name_or_path: str) -> None:
        """Takes the configuration of a pretrained `AutoencoderKL`, a folder or a Hub id."""
        self.vae_config = dict(AutoencoderKL.load_config(name_or_path))
        self.validate_architecture()

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> "TransfusionConfig":
        """Builds one of the paper's five sizes, or changes its other fields.

        Args:
            name (`str`): `"0.16B"`, `"0.37B"`, `"0.76B"`, `"1.4B"` or `"7B"`.
            fields (*optional*): Any other field of this configuration.

        Returns:
            `TransfusionConfig`: sequence length 4096 and Llama's vocabulary with three image tokens.

        Raises:
            ValueError: If there is no such preset.

        Source: Transfusion, table 2 and section 4.1.
        """
        if name not in PRESETS:
            raise ValueError(f"`name`={name!r} is not a preset. Presets: {list(PRESETS)}.")
        layers, hidden_size, heads, intermediate_size = PRESETS[name]
        text_config = {
            "model_type": "llama",
            "vocab_size": 32003,
            "num_hidden_layers": layers,
            "hidden_size": hidden_size,
            "num_attention_heads": heads,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": 4096,
        }
        return cls(text_config=text_config, **fields)


def check_image_tokenizer(field: str, config: dict[str, Any] | None) -> None:
    """Refuses a configuration of an image tokenizer that lacks its levels, or has absurdly many layers.

    Raises:
        ValueError: Naming the field and its value.
    """
    widths = [1] if config is None else config.get("block_out_channels")
    if not isinstance(widths, list | tuple) or not widths or not all(isinstance(width, int) for width in widths):
        raise ValueError(
            f"`{field}` has `block_out_channels`={widths!r}; it must be the channels of each level, a list."
        )
    layers = 1 if config is None else config.get("layers_per_block", 1)
    if not isinstance(layers, int) or not 0 <= layers <= MAX_LAYERS:
        raise ValueError(f"`{field}` has `layers_per_block`={layers!r}; it must lie between 0 and {MAX_LAYERS}.")


__all__ = ["TransfusionConfig"]
