"""Configuration of CM3Leon: the sizes of the decoder, the layout of its one vocabulary, the frozen image tokenizer.

Knows sizes, names and ids only; nothing here touches a tensor.
"""

import math
from typing import Any

from diffusers import VQModel
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2CLS


# (layers, hidden size, heads). Source: CM3Leon, table 3; the heads are those of the training code's standard sizes.
PRESETS: dict[str, tuple[int, int, int]] = {
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    "7B": (32, 4096, 32),
}

# Spelling of the tokens that stand for codes and for masked spans, in the tokenizer; {} is the number from 0.
CODE_TOKEN = "<code:{}>"
SENTINEL_TOKEN = "<sentinel:{}>"

IMAGE_POSITIONS = ("running", "grid", "rotary")
DECODER_BLOCKS = ("cm3leon", "chameleon")
OBJECTIVES = ("cm3", "causal")

# Beyond every model there is: a number of layers that is a slip of the pen is not built until memory is full.
MAX_LAYERS = 1024

# Pixels per code where the configuration names no image tokenizer. Source: CM3Leon, section 2.1: 256 px, 1024 codes.
PAPER_VQ_STRIDE = 8


@strict
class CM3LeonConfig(PreTrainedConfig):
    r"""Describes a CM3Leon model: one causal transformer over one vocabulary of text, image codes and specials.

    The image codes and the sentinels are ranges of ids; every other id is a field of its own. Default ids: 47613 text
    tokens, 8192 codes, `<break>`, `<eoss>`, `<image>`, 512 sentinels, which together are the paper's 56320.

    Args:
        vocab_size (`int`, defaults to 56320): Entries of the whole vocabulary.
        image_vocab_size (`int`, defaults to 8192): Entries of the codebook.
        first_image_token_id (`int`, defaults to 47613): Id of code 0; code `c` has id `first_image_token_id + c`.
        break_token_id (`int`, defaults to 55805): Stands between two parts of a document.
        eoss_token_id (`int`, defaults to 55806): Ends a span that was filled in.
        image_token_id (`int`, defaults to 55807):
            Placeholder for one code of a picture given as `pixel_values`; never predicted.
        num_sentinel_tokens (`int`, defaults to 512): Number of sentinels, so of masked spans in a document.
        first_sentinel_token_id (`int`, defaults to 55808): Id of sentinel 0.
        pad_token_id (`int`, defaults to 1): Padding.
        eos_token_id (`int`, defaults to 2): Document delimiter, the first and the last token of every document.
        hidden_size (`int`, defaults to 1024): Width of the decoder.
        intermediate_size (`int`, *optional*): Width of the feed-forward layers. Defaults to `4 * hidden_size`.
        num_hidden_layers (`int`, defaults to 24): Layers.
        num_attention_heads (`int`, defaults to 16): Attention heads.
        max_position_embeddings (`int`, defaults to 4096): Longest document.
        hidden_act (`str`, defaults to `"relu"`): Activation of the feed-forward layers.
        image_positions (`str`, defaults to `"running"`):
            `"running"`: codes have the running positions alone, as in the paper, so a picture's positions shift with
            the length of the text in front of it. `"grid"`: a learned embedding of a code's place in its image is
            added, so that a small model need not find out where a row begins. `"rotary"`: beside it, attention is
            rotated by places, so that a small model can look at the same place of another image, a picture that was
            given or retrieved. Behind a gap in an image, and in a span moved to the end, places are counted from 0
            anew, in training as in drawing.
        decoder_block (`str`, defaults to `"cm3leon"`):
            `"cm3leon"`: the paper's. `"chameleon"`: the library's Chameleon blocks, Llama's with normed queries and
            keys and norms behind attention and feed-forward instead of in front (`ChameleonSwinDecoderLayer`), rotary
            positions instead of learned ones, a gated feed-forward of three matrices, and weights that begin as the
            library's. Chameleon has besides `hidden_act="silu"`, `tie_word_embeddings=False`,
            `initializer_range=0.02`, `z_loss_weight=1e-5` and `objective="causal"`.
        objective (`str`, defaults to `"cm3"`):
            What documents the model is trained on. `"cm3"`: spans move to the end behind sentinels, by which the
            model fills in, captions, and has its unconditional stream. `"causal"`: documents as they are. Guidance
            then leads away from a document that opens with an image, captions follow their image, and nothing can be
            filled in.
        z_loss_weight (`float`, defaults to 0.0):
            Weight of the squared logarithm of the softmax's denominator, which keeps scores from drifting.
        image_loss_weight (`float`, defaults to 1.0):
            Weight of an image code in the loss, beside 1 of any other token; 0 leaves a model of text.
        layer_norm_eps (`float`, defaults to 1e-5):
            Added to the variance by the norms, which have no weights, but for those of Chameleon's blocks.
        initializer_range (`float`, defaults to 0.006):
            Standard deviation of the weights, a normal cut at three of them.
        position_initializer_range (`float`, defaults to 0.0002): The same for the position table.
        use_cache (`bool`, defaults to `True`): Whether keys and values are returned when no labels are given.
        tie_word_embeddings (`bool`, defaults to `True`): Whether the input embedding is also the output layer.
        vq_config (`dict`, *optional*):
            Configuration of the frozen diffusers `VQModel`. `None`: the model reads and writes codes only.
        image_size (`int`, defaults to 256): Height and width, in pixels, of every picture.
        drawing_guidance_scale (`float`, defaults to 3.0): Guidance of a drawing when none is asked for; 1 is off.
        drawing_temperature (`float`, defaults to 1.0): Divides the scores of codes when no temperature is asked for.

    Raises:
        ValueError: If a field is out of its range or the fields do not fit each other.

    Source: CM3Leon (arXiv 2309.02591), section 2 and table 3. Differs: the paper prints neither how its 56320 entries
    are divided nor its guidance scale; ours are the defaults above. Chameleon's blocks and z-loss: Chameleon (arXiv
    2405.09818), section 2.3; with norms behind, as Transfusion's baseline has them (arXiv 2408.11039, section 4).

    Example:
        >>> config = CM3LeonConfig.from_preset("760M")
        >>> config.hidden_size, config.intermediate_size, config.tokens_per_image
        (1536, 6144, 1024)

    """

    model_type = "cm3leon"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 56320
    image_vocab_size: int = 8192
    first_image_token_id: int = 47613
    break_token_id: int = 55805
    eoss_token_id: int = 55806
    image_token_id: int = 55807
    num_sentinel_tokens: int = 512
    first_sentinel_token_id: int = 55808
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    hidden_act: str = "relu"
    image_positions: str = "running"
    decoder_block: str = "cm3leon"
    objective: str = "cm3"
    z_loss_weight: float | int = 0.0
    image_loss_weight: float | int = 1.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.006
    position_initializer_range: float = 0.0002
    use_cache: bool = True
    tie_word_embeddings: bool = True
    vq_config: dict | None = None
    image_size: int = 256
    drawing_guidance_scale: float | int = 3.0
    drawing_temperature: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.decoder_block == "chameleon":  # norms of queries and keys cannot be cut by heads
            self.base_model_tp_plan = None  # type: ignore[assignment]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuses fields that do not fit each other; part of the `@strict` validation."""
        check_image_tokenizer("vq_config", self.vq_config)
        sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
        for name in sizes.split():
            if (value := self.__dict__[name]) < 1:
                raise ValueError(f"`{name}`={value} must be at least 1.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers`={self.num_hidden_layers} must be at most {MAX_LAYERS}.")
        if self.hidden_act not in ACT2CLS:
            raise ValueError(f"`hidden_act`={self.hidden_act!r} is not one of {sorted(ACT2CLS)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size`={self.hidden_size} must be a multiple of "
                f"`num_attention_heads`={self.num_attention_heads}."
            )
        if self.image_size % self.vq_stride or self.image_size < self.vq_stride:
            raise ValueError(f"`image_size`={self.image_size} must be a multiple of {self.vq_stride} pixels.")
        if (shortest := self.tokens_per_image + 3) > self.max_position_embeddings:
            raise ValueError(
                f"`max_position_embeddings`={self.max_position_embeddings} is too few for a picture of "
                f"{self.image_size} pixels, {self.tokens_per_image} codes and 3 delimiters. Raise it to at least "
                f"{shortest}, or lower `image_size`."
            )
        if self.drawing_guidance_scale < 1:
            raise ValueError(
                f"`drawing_guidance_scale`={self.drawing_guidance_scale} is below 1. Use 1 for no guidance."
            )
        if self.drawing_temperature <= 0:
            raise ValueError(f"`drawing_temperature`={self.drawing_temperature} must be above 0.")
        if self.vq_config is not None and self.vq_config.get("num_vq_embeddings") != self.image_vocab_size:
            codebook = self.vq_config.get("num_vq_embeddings")
            raise ValueError(
                f"`image_vocab_size`={self.image_vocab_size} is not the size of the image tokenizer's codebook, "
                f"{codebook}. Set `image_vocab_size` to it, and extend the text tokenizer by as many codes."
            )
        self._validate_choices()
        self._validate_vocabulary()

    def _validate_choices(self) -> None:
        """Refuses unknown names, blocks that cannot do what is asked of them, and weights below 0."""
        names = {"image_positions": IMAGE_POSITIONS, "decoder_block": DECODER_BLOCKS, "objective": OBJECTIVES}
        for name, known in names.items():
            if (value := self.__dict__[name]) not in known:
                raise ValueError(f"`{name}`={value!r} must be one of {known}.")
        if self.decoder_block == "chameleon":
            if self.image_positions == "rotary":
                raise ValueError(
                    "`image_positions`='rotary' rotates the queries of CM3Leon's own blocks; `decoder_block`="
                    "'chameleon' has 'running' and 'grid'."
                )
            if (head_dim := self.hidden_size // self.num_attention_heads) % 2:
                raise ValueError(
                    f"`hidden_size`={self.hidden_size} and `num_attention_heads`={self.num_attention_heads} make "
                    f"heads of {head_dim}, which `decoder_block`='chameleon' rotates in pairs. Make it even."
                )
        for name in ("z_loss_weight", "image_loss_weight"):
            if not 0 <= (value := self.__dict__[name]) < math.inf:
                raise ValueError(f"`{name}`={value} must be at least 0, and finite.")

    def _validate_vocabulary(self) -> None:
        """Refuses ids beyond the vocabulary or inside a range that is not theirs."""
        ranges = {
            "image_vocab_size": range(self.first_image_token_id, self.first_image_token_id + self.image_vocab_size),
            "num_sentinel_tokens": range(
                self.first_sentinel_token_id, self.first_sentinel_token_id + self.num_sentinel_tokens
            ),
        }
        for name, ids in ranges.items():
            if not ids or ids[0] < 0 or ids[-1] >= self.vocab_size:
                raise ValueError(
                    f"`{name}`={ids.stop - ids.start} ids from {ids.start} do not lie within the vocabulary of "
                    f"{self.vocab_size}."
                )
        codes, sentinels = ranges.values()
        if codes.start < sentinels.stop and sentinels.start < codes.stop:
            raise ValueError(
                f"`first_sentinel_token_id`={sentinels.start}: the sentinels up to {sentinels.stop - 1} overlap the "
                f"image codes, {codes.start} to {codes.stop - 1}."
            )
        for name in ("break_token_id", "eoss_token_id", "image_token_id", "eos_token_id", "pad_token_id"):
            value = self.__dict__[name]
            if not isinstance(value, int) or not 0 <= value < self.vocab_size or value in codes or value in sentinels:
                raise ValueError(
                    f"`{name}`={value} must be one id within the vocabulary of {self.vocab_size}, and none of an "
                    "image code or a sentinel."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration that was saved; refuses another family's, which would fill up with defaults."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"A configuration is a JSON object of fields, and this is {config_dict!r}.")
        if (family := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"`model_type`={family!r} is not {cls.model_type!r}: this checkpoint is of another family."
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"The configuration has a field of the wrong type ({type(error).__name__}: {error}): {config_dict!r}."
            ) from error

    @property
    def vq_stride(self) -> int:
        """Pixels per code, along each side; the paper's 8 where there is no image tokenizer."""
        return PAPER_VQ_STRIDE if self.vq_config is None else 2 ** (len(self.vq_config["block_out_channels"]) - 1)

    @property
    def tokens_per_image(self) -> int:
        """Codes of a picture."""
        return (self.image_size // self.vq_stride) ** 2

    @property
    def image_token_ids(self) -> range:
        """Ids of the image codes, in their order."""
        return range(self.first_image_token_id, self.first_image_token_id + self.image_vocab_size)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the vocabulary size and all ids from a tokenizer with codes, sentinels and specials.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): From `extend_tokenizer`.

        Raises:
            ValueError: If the tokenizer lacks one of the tokens, or has another number of codes than the codebook.
        """
        names = ("break_token", "eoss_token", "image_token", "eos_token", "pad_token")
        present = tokenizer.special_tokens_map
        vocabulary = tokenizer.get_vocab()
        missing = [name for name in names if not present.get(name)]
        missing += [token for token in (CODE_TOKEN.format(0), SENTINEL_TOKEN.format(0)) if token not in vocabulary]
        if missing:
            raise ValueError(f"`tokenizer` lacks {missing}. Give it to `extend_tokenizer` first.")
        self.vocab_size = len(tokenizer)
        self.first_image_token_id, self.image_vocab_size = token_range(vocabulary, CODE_TOKEN)
        self.first_sentinel_token_id, self.num_sentinel_tokens = token_range(vocabulary, SENTINEL_TOKEN)
        for name in names:
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(present[name]))
        self.validate_architecture()

    def set_image_tokenizer(self, name_or_path: str) -> None:
        """Takes the configuration of a pretrained `VQModel`, a folder or a Hub id.

        Raises:
            ValueError: If its codebook has another size than `image_vocab_size`.
        """
        self.vq_config = dict(VQModel.load_config(name_or_path))
        self.validate_architecture()

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> "CM3LeonConfig":
        """Builds one of the paper's three sizes, or changes its other fields.

        Args:
            name (`str`): `"350M"`, `"760M"` or `"7B"`.
            fields (*optional*): Any other field of this configuration.

        Returns:
            `CM3LeonConfig`: sequence length 4096 and a vocabulary of 56320.

        Raises:
            ValueError: If there is no such preset.

        Source: CM3Leon, table 3.
        """
        if name not in PRESETS:
            raise ValueError(f"`name`={name!r} is not a preset. Presets: {list(PRESETS)}.")
        layers, hidden_size, heads = PRESETS[name]
        return cls(**{"num_hidden_layers": layers, "hidden_size": hidden_size, "num_attention_heads": heads, **fields})


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


def token_range(vocabulary: dict[str, int], spelling: str) -> tuple[int, int]:
    """Returns the id of token 0 of a numbered kind, and how many follow it without a gap."""
    first, count = vocabulary[spelling.format(0)], 0
    while vocabulary.get(spelling.format(count)) == first + count:
        count += 1
    return first, count


__all__ = ["CM3LeonConfig"]
