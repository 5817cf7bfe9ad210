"""The CM3Leon model: a causal decoder without biases over text and image codes, and its frozen image tokenizer.

Knows ids; strings and pictures are the processor's, span masking and packing the data's. The blocks are in
`layers_cm3leon.py`, Chameleon's for comparison in `blocks_cm3leon.py`, decoding is in `generation_cm3leon.py`.
"""

# Axes: B rows, L sequence, D hidden, V vocabulary, N pictures of all rows in reading order, K codes per picture.

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchvision_available
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks_cm3leon import BLOCK_CLASSES, build_blocks, build_positions
from .configuration_cm3leon import CM3LeonConfig
from .generation_cm3leon import CM3LeonGenerationMixin
from .image_codes_cm3leon import decode_codes, full_precision
from .layers_cm3leon import PositionEmbedding, ResidualProjection
from .layout_cm3leon import (
    CM3LeonOutput,
    find_places,
    refuse_leaky_packing,
    refuse_unless,
    running_positions,
    shift_labels,
)
from .loading_cm3leon import refuse_damaged, refuse_unbuildable
from .losses_cm3leon import sum_in_pieces
from .packing_cm3leon import find_documents
from .places_cm3leon import ImagePlaceEmbedding, PlaceRotation


# Weights beyond this many standard deviations are drawn again. Source: CM3Leon, section 2.3.
INIT_CUTOFF = 3.0

# Scores that the loss holds at a time, 128 MiB in float32. Compiled, a loss of more computes all of them twice.
MAX_SCORES = 2**25


class CM3LeonPreTrainedModel(PreTrainedModel):
    """What every CM3Leon class shares: initialisation and what the library may do with it."""

    config: CM3LeonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer, _ in BLOCK_CLASSES.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": [layer for layer, _ in BLOCK_CLASSES.values()],
        "attentions": [attention for _, attention in BLOCK_CLASSES.values()],
    }
    # The library's any-to-any pipeline refuses image input without torchvision, which nothing here needs.
    input_modalities = ("text", "image") if is_torchvision_available() else ("text",)
    output_modalities = ("text", "image")

    @property
    def _supports_flash_attn(self) -> bool:  # type: ignore[override]
        """Chameleon's attention keeps from flash kernels the positions by which they tell packed documents apart."""
        return self.config.decoder_block != "chameleon"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint as every model of transformers does.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id.
            args: Those of the library.
            kwargs: Likewise.

        Raises:
            OSError: If there is no such checkpoint, or its files are damaged or do not belong together.
            ValueError: If it is of another family, or its configuration does not fit together.
        """
        with refuse_damaged(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal weights; zeros where a layer writes to the residual stream; nearly nothing for positions.

        Weights of Chameleon's blocks, and around them, begin as the library's. The convolutions are the image
        tokenizer's, which stays as PyTorch would make it until trained weights come.

        Source: CM3Leon, section 2.3. Differs: the paper's "output layers" set to zero are taken to be the two
        projections of each layer that write to the residual stream; the tied output layer cannot be zero.
        """
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        elif self.config.decoder_block == "chameleon":
            super()._init_weights(module)
        elif isinstance(module, ResidualProjection):
            init.zeros_(module.weight)
        elif isinstance(module, PositionEmbedding):
            self._init_truncated(module.weight, self.config.position_initializer_range)
        elif isinstance(module, nn.Linear | nn.Embedding):
            self._init_truncated(module.weight, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @staticmethod
    def _init_truncated(weight: torch.Tensor, std: float) -> None:
        """Fills `weight` from a normal distribution cut at three standard deviations."""
        init.trunc_normal_(weight, mean=0.0, std=std, a=-INIT_CUTOFF * std, b=INIT_CUTOFF * std)


class CM3LeonModel(CM3LeonPreTrainedModel):
    """The decoder: ids in, hidden states out.

    Args:
        config (`CM3LeonConfig`): Sizes of all parts.

    Source: CM3Leon (arXiv 2309.02591), section 2.3.
    """

    _keys_to_ignore_on_load_unexpected = [r"lm_head"]

    def __init__(self, config: CM3LeonConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions, self.rotary_emb = build_positions(config)
        self.embed_places = None
        if config.image_positions != "running":
            self.embed_places = ImagePlaceEmbedding(config.tokens_per_image, config.hidden_size)
        self.layers, self.norm = build_blocks(config)
        self.image_tokenizer = None
        if config.vq_config is not None:
            with refuse_unbuildable("vq_config"):
                self.image_tokenizer = VQModel.from_config(config.vq_config).requires_grad_(False).eval()
        self.gradient_checkpointing = False
        self.post_init()

    def train(self, mode: bool = True) -> "CM3LeonModel":
        """Switches the training mode; the image tokenizer stays frozen and in evaluation mode."""
        super().train(mode)
        if self.image_tokenizer is not None:
            self.image_tokenizer.requires_grad_(False).eval()  # again, since loading leaves every weight trainable
        return self

    def require_image_tokenizer(self) -> VQModel:
        """Returns the image tokenizer, refusing a model that has none."""
        if self.image_tokenizer is None:
            raise ValueError(
                "this model has no image tokenizer (`vq_config` is None), so it reads and writes codes only. Name one "
                "with `CM3LeonConfig.set_image_tokenizer` and load it with `load_image_tokenizer`."
            )
        return self.image_tokenizer

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turns pictures into the ids of their codes, row by row from the top.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`): In [-1, 1].

        Returns:
            `torch.LongTensor` of shape `(num_images, tokens_per_image)`: ids of the vocabulary.

        Raises:
            ValueError: If there is no image tokenizer, or the pictures have another size.
        """
        tokenizer, side = self.require_image_tokenizer(), self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != (side, side):
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; the model reads pictures of {side} x {side} "
                f"pixels, {self.config.tokens_per_image} codes each. Resize them, or change `image_size`."
            )
        with full_precision(tokenizer):
            latents = tokenizer.encode(pixel_values.to(tokenizer.dtype)).latents
        vectors = latents.permute(0, 2, 3, 1).flatten(1, 2).float()  # (N, K, channels of a code)
        codes = torch.cdist(vectors, tokenizer.quantize.embedding.weight.float()).argmin(-1)
        return codes + self.config.first_image_token_id

    @torch.no_grad()
    def decode_image_tokens(self, image_ids: torch.Tensor) -> torch.Tensor:
        """Turns ids of codes into pictures, the inverse of `encode_images` as far as the tokenizer is one.

        Args:
            image_ids (`torch.LongTensor` of shape `(num_images, tokens_per_image)`): Ids of the vocabulary.

        Returns:
            `torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`: in [-1, 1] but for overshoots.

        Raises:
            ValueError: If there is no image tokenizer, a picture has another number of codes, or an id is no code.
        """
        tokenizer = self.require_image_tokenizer()
        if image_ids.ndim != 2 or image_ids.shape[1] != self.config.tokens_per_image:
            raise ValueError(
                f"`image_ids` has shape {tuple(image_ids.shape)}; a picture of {self.config.image_size} pixels has "
                f"{self.config.tokens_per_image} codes."
            )
        codes = image_ids - self.config.first_image_token_id
        refuse_unless(
            ((codes >= 0) & (codes < self.config.image_vocab_size)).all(),
            f"`image_ids` holds ids that are no image codes, which are {self.config.image_token_ids}.",
        )
        grid = self.config.image_size // self.config.vq_stride
        return decode_codes(tokenizer, codes.view(-1, grid, grid))

    def place_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Puts the codes of pictures where their placeholders stand.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): `config.image_token_id` for each
                code of a picture, the pictures in reading order.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*): In [-1, 1].

        Returns:
            `torch.LongTensor` of the same shape, without placeholders.

        Raises:
            ValueError: If there are more or fewer placeholders than codes.
        """
        if input_ids.shape[1] == 1 and pixel_values is None:
            return input_ids  # one more token of an answer
        is_image = input_ids == self.config.image_token_id
        codes = input_ids.new_empty(0) if pixel_values is None else self.encode_images(pixel_values).flatten()
        refuse_unless(
            is_image.sum() == len(codes),
            f"`input_ids` holds another number of image placeholders than the {len(codes)} codes of `pixel_values`.",
        )
        return input_ids if pixel_values is None else input_ids.masked_scatter(is_image, codes)

    def _documents_apart(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> list[int] | None:
        """Lengths of packed documents that are read one by one, `None` where one mask serves all."""
        is_plain = position_ids is not None and attention_mask is None and past_key_values is None
        is_plain = is_plain and self.config.decoder_block == "cm3leon"  # the library's attention has masks alone
        if is_plain and self.config._attn_implementation == "sdpa" and inputs_embeds.device.type == "cpu":
            return find_documents(position_ids, len(inputs_embeds))
        return None

    def _add_positions(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        input_ids: torch.Tensor | None,
        image_places: torch.Tensor | None,
        goes_on: bool,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Adds to embeddings what they are told of their positions, and lists what the blocks are told."""
        hidden_states, config, told = inputs_embeds, self.config, {}
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(positions)
        if self.rotary_emb is not None:
            told["position_embeddings"] = self.rotary_emb(hidden_states, position_ids=positions)
        if self.embed_places is not None:
            places = find_places(input_ids, config, goes_on=goes_on) if image_places is None else image_places
            hidden_states = hidden_states + self.embed_places(places)
            if config.image_positions == "rotary":
                head_dim = config.hidden_size // config.num_attention_heads
                told["place_rotation"] = PlaceRotation.of(
                    places, head_dim, config.tokens_per_image, hidden_states.dtype
                )
        return hidden_states, told

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_places: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""Reads text and images.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text, codes, delimiters, and placeholders for the codes of `pixel_values`.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                0 on padding. Leave out for packed windows, whose documents are told apart by `position_ids`.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Running positions, restarting at 0 with each packed document. Counted from the mask if left out.
            past_key_values (`Cache`, *optional*): What was read before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings instead of `input_ids`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                Pictures in [-1, 1], encoded here with the frozen image tokenizer.
            image_places (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Place of each code in its image, -1 elsewhere; unread with `image_positions="running"`. Found in
                `input_ids` if left out, unless these go on from a cache: `generate` gives it.
            use_cache (`bool`, *optional*): Whether to return `past_key_values`.
            kwargs: Passed on to the attention.

        Returns:
            `BaseModelOutputWithPast`

        Raises:
            ValueError: If pictures and placeholders do not match, packed documents would see each other, or a
                document is longer than there are positions, or the places of codes cannot be known.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            input_ids = self.place_images(input_ids, pixel_values)
            inputs_embeds = self.embed_tokens(input_ids)
        elif pixel_values is not None:
            raise ValueError("`pixel_values` need `input_ids`, where their placeholders stand, not `inputs_embeds`.")
        refuse_leaky_packing(position_ids, attention_mask, past_key_values, use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = position_ids
        if positions is None:
            positions = running_positions(attention_mask, past_length, inputs_embeds)
        if inputs_embeds.shape[1] > 1:  # not asked for each token of an answer
            limit = self.config.max_position_embeddings
            refuse_unless(
                (positions < limit).all(),
                f"a document is longer than `max_position_embeddings`={limit}. Shorten it.",
            )
        if (documents := self._documents_apart(inputs_embeds, attention_mask, past_key_values, position_ids)) is None:
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        else:
            kwargs["document_lengths"] = documents
        hidden_states, told = self._add_positions(
            inputs_embeds, positions, input_ids, image_places, goes_on=past_length > 0
        )
        for layer in self.layers:
            outputs = layer(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **told,
                **kwargs,
            )
            hidden_states = outputs[0] if isinstance(outputs, tuple) else outputs  # the library's layers give tuples
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class CM3LeonForConditionalGeneration(CM3LeonPreTrainedModel, CM3LeonGenerationMixin):
    """CM3Leon with its output layer: trains on text and images alike, writes text, draws images, fills in either.

    Args:
        config (`CM3LeonConfig`): Sizes of all parts.

    Source: CM3Leon (arXiv 2309.02591), sections 2 and 3.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CM3LeonConfig) -> None:
        super().__init__(config)
        self.model = CM3LeonModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # An answer ends with the document, or with the span that was to be filled in.
        self.generation_config = GenerationConfig(
            eos_token_id=[config.eos_token_id, config.eoss_token_id], pad_token_id=config.pad_token_id
        )
        self.post_init()

    @property
    def image_tokenizer(self) -> VQModel | None:
        """The frozen image tokenizer, `None` where the model reads and writes codes only."""
        return self.model.image_tokenizer

    def load_image_tokenizer(self, name_or_path: str) -> None:
        """Loads the weights of the frozen `VQModel` that `config.vq_config` describes.

        Args:
            name_or_path (`str`): Folder or Hub id of the tokenizer.

        Raises:
            ValueError: If its codebook is of another size than the configuration's, or there is none in it.
        """
        tokenizer = VQModel.from_pretrained(name_or_path, use_safetensors=True)
        if tokenizer.config.num_vq_embeddings != self.config.image_vocab_size:
            raise ValueError(
                f"`name_or_path`={name_or_path!r} has a codebook of {tokenizer.config.num_vq_embeddings} codes; the "
                f"model's `image_vocab_size` is {self.config.image_vocab_size}."
            )
        self.model.require_image_tokenizer().load_state_dict(tokenizer.state_dict())

    @apply_forward_hook  # offloaded weights are brought back by `forward` alone
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turns pictures into the ids of their codes; see [`CM3LeonModel`]."""
        return self.model.encode_images(pixel_values)

    def decode_image_tokens(self, image_ids: torch.Tensor) -> torch.Tensor:
        """Turns ids of codes into pictures; see [`CM3LeonModel`]."""
        return self.model.decode_image_tokens(image_ids)

    def _is_code(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Marks image codes, and the placeholders that stand for them."""
        codes = self.config.image_token_ids
        return ((token_ids >= codes.start) & (token_ids < codes.stop)) | (token_ids == self.config.image_token_id)

    def count_targets(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Counts what the losses of a batch are means over.

        Summed over micro-batches and processes and given to `forward`, the counts make accumulation and data
        parallelism equal to one big batch.

        Args:
            batch (`dict`): Keyword arguments of `forward`.

        Returns:
            `dict`: `num_items_in_batch`, all targets, and `num_image_items_in_batch`, those that are image codes.
        """
        targets = shift_labels(batch["labels"], batch.get("position_ids"))
        return {
            "num_items_in_batch": (targets != -100).sum(),
            "num_image_items_in_batch": self._is_code(targets).sum(),
        }

    def _losses(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        num_items: torch.Tensor | int | None,
        num_image_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, and the cross-entropy of targets that are text and of those that are codes, each a mean.

        Only the positions that have a target are scored, and never more than `MAX_SCORES` scores are held at a time.
        """
        flat, wanted = hidden.flatten(0, 1), targets.flatten()
        if not torch.compiler.is_compiling():  # a compiled graph has fixed shapes and scores every position instead
            index = (wanted != -100).nonzero().flatten()
            flat, wanted = flat[index], wanted[index]
        num_positions = max(1, MAX_SCORES // self.config.vocab_size)
        weights = [weight for weight in self.lm_head.parameters() if weight.requires_grad]
        weighted, total, image_total = sum_in_pieces(self._sum_losses, flat, wanted, num_positions, weights)
        weight = self.config.image_loss_weight
        if weight != 1 and (num_items is None) != (num_image_items is None):
            raise ValueError(
                f"`image_loss_weight` of the configuration is {weight}, so `num_items_in_batch` needs "
                "`num_image_items_in_batch` beside it. Give both, as `count_targets` does, or neither."
            )
        if num_items is None:
            num_items = (wanted != -100).sum()
        if num_image_items is None:
            num_image_items = self._is_code(wanted).sum()
        counts = [torch.as_tensor(count, device=total.device) for count in (num_items, num_image_items)]
        weight_total = counts[0] - (1 - weight) * counts[1]
        return (
            weighted / torch.where(weight_total > 0, weight_total, 1),
            (total - image_total).detach() / (counts[0] - counts[1]).clamp(min=1),
            image_total.detach() / counts[1].clamp(min=1),
        )

    def _sum_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sums the loss of positions `(number, D)`, and the cross-entropy of all targets and of those that are codes.

        Source: Chameleon (arXiv 2405.09818), section 2.3, for the z-loss, `log(Z)**2` with `Z` the denominator of the
        softmax.
        """
        config, is_code = self.config, self._is_code(targets)
        scores = self._score(hidden).float()
        if config.z_loss_weight:
            log_z = scores.logsumexp(-1)
            ignored = targets == -100
            losses = log_z - scores.gather(-1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
            losses = losses.masked_fill(ignored, 0.0)
            weighted = losses + config.z_loss_weight * log_z.square().masked_fill(ignored, 0.0)
        else:
            weighted = losses = F.cross_entropy(scores, targets, ignore_index=-100, reduction="none")
        if config.image_loss_weight != 1:
            weighted = torch.where(is_code, config.image_loss_weight * weighted, weighted)
        return weighted.sum(), losses.sum(), losses.masked_fill(~is_code, 0.0).sum()

    def _score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores all entries; of rows that training holds no gradient is computed, where it would be thrown away."""
        weight = self.lm_head.weight
        held = getattr(weight, "held_rows", None)
        if held is None or not weight.requires_grad:  # frozen behind an adapter, which `lm_head` alone goes through
            return self.lm_head(hidden)
        before, kept, after = weight.tensor_split((held.start, held.stop))
        return torch.cat([F.linear(hidden, part) for part in (before, kept.detach(), after)], dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_image_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CM3LeonOutput:
        r"""Reads text and images; with `labels`, returns the loss of what comes next.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                See [`CM3LeonModel`].
            attention_mask (`torch.Tensor`, *optional*): See [`CM3LeonModel`].
            position_ids (`torch.LongTensor`, *optional*): See [`CM3LeonModel`].
            past_key_values (`Cache`, *optional*): See [`CM3LeonModel`].
            inputs_embeds (`torch.FloatTensor`, *optional*): See [`CM3LeonModel`].
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*): In [-1, 1].
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                `input_ids` with -100 where there is nothing to predict; shifted here. Placeholders stand for the
                codes that `pixel_values` put in their place.
            use_cache (`bool`, *optional*): Defaults to `False` with labels, else to the configuration's.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Number of last positions to score, 0 for all.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): See `count_targets`; defaults to this batch's.
            num_image_items_in_batch (`int` or `torch.Tensor`, *optional*): Likewise.
            kwargs: Passed on to the attention.

        Returns:
            [`CM3LeonOutput`]

        Raises:
            ValueError: If pictures and placeholders do not match, packed documents would see each other, or a
                document is longer than there are positions.

        Source: CM3Leon, section 2.3: every token has weight 1, unless `image_loss_weight` says otherwise.
        """
        if use_cache is None:
            use_cache = labels is None and self.config.use_cache
        if pixel_values is not None and input_ids is not None:
            input_ids, pixel_values = self.model.place_images(input_ids, pixel_values), None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = text_loss = image_loss = logits = None
        if labels is None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        if labels is not None:
            if input_ids is not None:
                labels = torch.where(labels == self.config.image_token_id, input_ids, labels)
            targets = shift_labels(labels, position_ids)
            loss, text_loss, image_loss = self._losses(hidden, targets, num_items_in_batch, num_image_items_in_batch)
        return CM3LeonOutput(
            loss=loss,
            text_loss=text_loss,
            image_loss=image_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["CM3LeonForConditionalGeneration", "CM3LeonModel", "CM3LeonPreTrainedModel"]
