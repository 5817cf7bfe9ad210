"""The Transfusion model: a Llama-style backbone by composition, the image mask, and the images in it.

The backbone is transformers' own, so a Llama checkpoint's weights load as they are and text-only logits are equal.
Both losses are in `objective_transfusion.py`; drawing, a loop over denoising steps, is in
`drawing_transfusion.py`, writing in `generation_transfusion.py`; packing and noise draws belong to the data.
"""

# Axes: B rows, L sequence, D hidden, V vocabulary, N images of all rows in reading order, P patches per image,
#       C latent channels, H and W latent pixels.

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchvision_available

from .configuration_transfusion import TransfusionConfig
from .generation_transfusion import TransfusionGenerationMixin
from .layout_transfusion import (
    ImageStates,
    TransfusionModelOutput,
    TransfusionOutput,
    find_patches,
    image_block_ids,
    refuse_leaky_packing,
)
from .loading_transfusion import refuse_damaged, refuse_unbuildable
from .noise_transfusion import CLEAN_TIMESTEP, NoiseProcess
from .objective_transfusion import ObjectiveMixin
from .patching_transfusion import UNetPatchIn, build_patch_layers
from .places_transfusion import PlaceRotaryEmbedding, add_places, patch_places


class TransfusionPreTrainedModel(PreTrainedModel):
    """What every Transfusion class shares: initialisation and what the library may do with it."""

    config: TransfusionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # flash kernels drop the mask that lets the patches of an image see each other
    _supports_attention_backend = True
    _supports_context_parallel = False  # context parallelism drops that mask too
    # The library's any-to-any pipeline refuses image input without torchvision, which nothing here needs.
    input_modalities = ("text", "image") if is_torchvision_available() else ("text",)
    output_modalities = ("text", "image")

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
        """Normal weights and zero biases, as in the backbone."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class TransfusionModel(TransfusionPreTrainedModel):
    """The backbone with its image layers: text ids and latent images in, hidden states out.

    Args:
        config (`TransfusionConfig`): Sizes of all parts.

    Source: Transfusion (arXiv 2408.11039), section 3.
    """

    _keys_to_ignore_on_load_unexpected = [r"lm_head"]

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__(config)
        with refuse_unbuildable("text_config"):
            self.language_model = AutoModel.from_config(config.text_config)
        if config.patch_positions == "rotary":
            self.language_model.rotary_emb = PlaceRotaryEmbedding(config, self.language_model.rotary_emb)
        with refuse_unbuildable("unet_block_out_channels"):
            self.patch_in, self.patch_out = build_patch_layers(config)
        self.vae = None
        if config.vae_config is not None:
            with refuse_unbuildable("vae_config"):
                self.vae = AutoencoderKL.from_config(config.vae_config).requires_grad_(False).eval()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Gives the layers of a U-Net a spread that follows their fan-in.

        Its widths differ from level to level, and with one small spread for all it hardly hears the timestep. Asked of
        each layer by itself, since the library passes over modules that hold layers but no weights of their own.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d) and isinstance(self.patch_in, UNetPatchIn):
            if any(module is layer for part in (self.patch_in, self.patch_out) for layer in part.modules()):
                init.kaiming_uniform_(module.weight, a=5**0.5)

    def train(self, mode: bool = True) -> "TransfusionModel":
        """Switches the training mode; the VAE stays frozen and in evaluation mode."""
        super().train(mode)
        if self.vae is not None:
            self.vae.requires_grad_(False).eval()  # again, since loading leaves every weight trainable
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Returns the text embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text embedding."""
        self.language_model.set_input_embeddings(value)

    @torch.no_grad()
    def encode_pixels(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Encodes pictures as scaled latents, which are the pictures themselves where there is no VAE.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`): In [-1, 1].
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Height and width in latent pixels where they differ; padding is cut off before encoding.
            generator (`torch.Generator`, *optional*): Samples the latents; without it their mean is taken.

        Returns:
            `torch.FloatTensor` of shape `(num_images, channels, height / vae_stride, width / vae_stride)`.
        """
        if self.vae is None:
            return pixel_values
        if image_sizes is None:
            return self._encode(pixel_values, generator)
        stride = self.config.vae_stride
        latents = pixel_values.new_zeros(
            len(pixel_values), self.config.latent_channels, *(side // stride for side in pixel_values.shape[-2:])
        )
        for height, width in dict.fromkeys(map(tuple, image_sizes.tolist())):
            index = (image_sizes == image_sizes.new_tensor([height, width])).all(-1).nonzero().flatten()
            pictures = pixel_values[index, :, : height * stride, : width * stride]
            latents[index, :, :height, :width] = self._encode(pictures, generator).to(latents.dtype)
        return latents

    def _encode(self, pixel_values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Encodes pictures of one size."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        latents = (posterior.mode() if generator is None else posterior.sample(generator)).float()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes scaled latents as pictures in [-1, 1], the inverse of `encode_pixels`."""
        if self.vae is None:
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents).sample

    def create_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
        block_ids: torch.Tensor,
    ) -> Any:
        """Builds the mask `causal OR same image` for `inputs_embeds` behind what the cache holds.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The new positions.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                0 on padding.
            past_key_values (`Cache`, *optional*): What was read before.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Packed documents restart at 0 and are kept apart.
            block_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): From `image_block_ids`.

        Returns:
            The mask in the form of the attention in use: a tensor, or a `BlockMask` for FlexAttention.

        Source: Transfusion, section 3 (attention) and figure 4.
        """
        if self.config.image_attention == "causal":
            block_ids = torch.full_like(block_ids, -1)
        if past_key_values is not None and (past_length := int(past_key_values.get_seq_length())):
            block_ids = F.pad(block_ids, (past_length, 0), value=-1)  # the library wants absolute positions
        return create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=block_ids,
        )

    def read_images(
        self, latents: torch.Tensor, timesteps: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]]]:
        """Turns images into patches, one call of the patch layer for each size.

        Args:
            latents (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): Padded to the largest.
            timesteps (`torch.Tensor` of shape `(num_images,)`): How noisy each is.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Height and width of each in latent pixels; `None` where all fill `latents`.

        Returns:
            `torch.FloatTensor` of shape `(num_patches, hidden_size)` in reading order, and the groups by size.
        """
        if image_sizes is None:
            patches, skips = self.patch_in(latents, timesteps)
            everything = torch.arange(len(latents), device=latents.device)
            return patches.flatten(0, 1), [(everything, tuple(latents.shape[-2:]), skips)]
        groups, pieces = [], [torch.empty(0)] * len(latents)
        for height, width in dict.fromkeys(map(tuple, image_sizes.tolist())):
            index = (image_sizes == image_sizes.new_tensor([height, width])).all(-1).nonzero().flatten()
            patches, skips = self.patch_in(latents[index, :, :height, :width], timesteps[index])
            groups.append((index, (height, width), skips))
            for image, piece in zip(index.tolist(), patches, strict=True):
                pieces[image] = piece
        return torch.cat(pieces), groups

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TransfusionModelOutput:
        r"""Reads text and images.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text, with `config.image_token_id` standing for each patch.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                0 on padding. Leave out for packed windows, whose documents are told apart by `position_ids`.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Running positions, restarting at 0 with each packed document.
            past_key_values (`Cache`, *optional*): What was read before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Text embeddings instead of `input_ids`; images need `input_ids`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                Pictures in [-1, 1], encoded here with the frozen VAE.
            latents (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                Images that are encoded already; noised already where `timesteps` says so.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Height and width of each image in latent pixels, where they differ.
            timesteps (`torch.Tensor` of shape `(num_images,)`, *optional*): Defaults to clean images.
            use_cache (`bool`, *optional*): Whether to return `past_key_values`.
            kwargs: Passed on to the attention.

        Returns:
            [`TransfusionModelOutput`]

        Raises:
            ValueError: If images and placeholders do not match, or packed documents would see each other.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if use_cache is None:
            use_cache = self.config.text_config.use_cache
        refuse_leaky_packing(position_ids, attention_mask, past_key_values, use_cache)
        images = None
        if latents is None and pixel_values is not None:
            latents = self.encode_pixels(pixel_values, image_sizes)
        if latents is not None:
            if timesteps is None:
                timesteps = torch.full((len(latents),), CLEAN_TIMESTEP, device=latents.device)
            is_image = input_ids == self.config.image_token_id
            places = patch_places(latents.shape, image_sizes, self.config.patch_size)
            places = places.to(is_image.device, non_blocking=True)
            patch_index = find_patches(is_image, places)  # before the device has much to do, for the host waits here
            patches, groups = self.read_images(latents.to(inputs_embeds.dtype), timesteps, image_sizes)
            images = ImageStates(groups, timesteps, patch_index)
            inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], patches.to(inputs_embeds.dtype))
            block_ids = image_block_ids(is_image)
            attention_mask = self.create_masks(inputs_embeds, attention_mask, past_key_values, position_ids, block_ids)
            if self.config.patch_positions == "rotary":
                past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
                position_ids = add_places(position_ids, is_image, places, past_length)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return TransfusionModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            images=images,
        )


class TransfusionForConditionalGeneration(TransfusionPreTrainedModel, ObjectiveMixin, TransfusionGenerationMixin):
    """Transfusion with its language head: trains on both losses, writes text, draws images.

    Args:
        config (`TransfusionConfig`): Sizes of all parts.

    Source: Transfusion (arXiv 2408.11039), sections 3 and 4.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    accepts_loss_kwargs = False  # the library's Trainer counts what is text of accumulated batches alone

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__(config)
        self.model = TransfusionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.noise_process = NoiseProcess(config)
        self.post_init()

    @property
    def vae(self) -> AutoencoderKL | None:
        """The frozen image tokenizer, `None` where the model works on raw pixels."""
        return self.model.vae

    def load_image_tokenizer(self, name_or_path: str) -> None:
        """Loads the weights of the frozen `AutoencoderKL` that `config.vae_config` describes.

        Args:
            name_or_path (`str`): Folder or Hub id of the autoencoder.
        """
        vae = AutoencoderKL.from_pretrained(name_or_path, use_safetensors=True)
        self.model.vae.load_state_dict(vae.state_dict())

    @classmethod
    def from_llama(
        cls, name_or_path: str, *, boi_token_id: int, eoi_token_id: int, image_token_id: int, **fields: Any
    ) -> "TransfusionForConditionalGeneration":
        """Starts from the weights of any Llama-architecture checkpoint; the image layers start at random.

        Args:
            name_or_path (`str`): Folder or Hub id of the text model.
            boi_token_id (`int`): Id of the token that opens an image; grown into the vocabulary where it is larger.
            eoi_token_id (`int`): Id of the token that closes an image, likewise.
            image_token_id (`int`): Id of the patch placeholder, likewise.
            fields (*optional*): Other fields of [`TransfusionConfig`].

        Returns:
            `TransfusionForConditionalGeneration`: its text-only logits equal the text model's, unless
            `patch_positions="rotary"` takes half of the rotations for places.

        Raises:
            ValueError: If the checkpoint is no Llama-style decoder.
        """
        from transformers import AutoModelForCausalLM

        text_model = AutoModelForCausalLM.from_pretrained(name_or_path)
        if text_model.config.model_type != "llama":
            raise ValueError(
                f"`name_or_path`={name_or_path!r} holds a {text_model.config.model_type!r} model; give a 'llama' one."
            )
        needed = max(boi_token_id, eoi_token_id, image_token_id) + 1
        if needed > text_model.config.vocab_size:
            text_model.resize_token_embeddings(needed)
        config = TransfusionConfig(
            text_config=text_model.config,
            boi_token_id=boi_token_id,
            eoi_token_id=eoi_token_id,
            image_token_id=image_token_id,
            **fields,
        )
        model = cls(config)
        model.model.language_model.load_state_dict(text_model.model.state_dict())
        model.lm_head.load_state_dict(text_model.lm_head.state_dict())
        model.generation_config = text_model.generation_config
        return model.to(text_model.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.FloatTensor | None = None,
        clean_images: torch.BoolTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_images_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TransfusionOutput:
        r"""Reads text and images; with `labels`, noises the images and returns the loss of both.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                See [`TransfusionModel`].
            attention_mask (`torch.Tensor`, *optional*): See [`TransfusionModel`].
            position_ids (`torch.LongTensor`, *optional*): See [`TransfusionModel`].
            past_key_values (`Cache`, *optional*): See [`TransfusionModel`].
            inputs_embeds (`torch.FloatTensor`, *optional*): See [`TransfusionModel`].
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                `input_ids` with -100 where there is nothing to predict; shifted here.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*): In [-1, 1].
            latents (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*): Clean latents.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): In latent pixels.
            timesteps (`torch.Tensor` of shape `(num_images,)`, *optional*):
                How much noise to add. Drawn here if left out while there are labels; without labels images stay clean.
            noise (`torch.FloatTensor` of the shape of the latents, *optional*): Drawn here if left out.
            clean_images (`torch.BoolTensor` of shape `(num_images,)`, *optional*):
                True where an image is context: neither noised nor counted in the loss.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): See `count_targets`; defaults to this batch's.
            num_images_in_batch (`int` or `torch.Tensor`, *optional*): Likewise for the images.
            use_cache (`bool`, *optional*): Defaults to `False` with labels, else to the configuration's.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Number of last positions to score, 0 for all.
            kwargs: Passed on to the attention.

        Returns:
            [`TransfusionOutput`]

        Raises:
            ValueError: If images and placeholders do not match, or packed documents would see each other.

        Source: Transfusion, equation 4: `L = L_LM + lambda * L_DDPM`.
        """
        if use_cache is None:
            use_cache = labels is None and self.config.text_config.use_cache
        if latents is None and pixel_values is not None:
            latents = self.model.encode_pixels(pixel_values, image_sizes)
        targets = index = None
        if labels is not None:
            if latents is not None and (num_items_in_batch is None) != (num_images_in_batch is None):
                raise ValueError(
                    "`num_items_in_batch` and `num_images_in_batch` belong together where there are images. Give "
                    "both, as `count_targets` does, or neither."
                )
            targets = self.text_targets(input_ids, labels, position_ids)
            if not torch.compiler.is_compiling():  # a compiled graph has fixed shapes and scores every position
                index = (targets.flatten() != -100).nonzero().flatten()  # the host waits, so before the long work
        inputs, target = latents, None
        if latents is not None and (labels is not None or timesteps is not None):
            if timesteps is None:
                timesteps = self.timestep_sampler()(len(latents)).to(latents.device)
            noise = torch.randn_like(latents) if noise is None else noise
            inputs = self.noise_process.add_noise(latents, noise, timesteps)
            target = self.noise_process.target(latents, noise, timesteps)
            if clean_images is not None:
                inputs = torch.where(clean_images[:, None, None, None], latents, inputs)
                timesteps = torch.where(clean_images, CLEAN_TIMESTEP, timesteps)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            latents=inputs,
            image_sizes=image_sizes,
            timesteps=timesteps,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = text_loss = image_loss = logits = noise_pred = None
        if labels is None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        if target is not None:
            noise_pred = self._predict_images(hidden, outputs.images, latents.shape)
        if targets is not None:
            loss = text_loss = self._text_loss(hidden, targets, index, num_items_in_batch)
            if target is not None:
                image_loss = self._image_loss(noise_pred, target, outputs.images, clean_images, num_images_in_batch)
                loss = text_loss + self.config.diffusion_loss_weight * image_loss
        return TransfusionOutput(
            loss=loss,
            text_loss=text_loss,
            image_loss=image_loss,
            logits=logits,
            noise_pred=noise_pred,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["TransfusionForConditionalGeneration", "TransfusionModel", "TransfusionPreTrainedModel"]
