"""Chameleon and Anole checkpoints that draw: transformers' own class behind the decoding of CM3Leon.

The library's class reads pictures and writes text only; its forward forbids image codes. This one gives their logits
too and says where they are; guidance, image spans and interleaving are then those of `generation_cm3leon.py`. The
decoder of the codes, which the library has not either, comes from `convert_vqgan_cm3leon.py`.
"""

from math import isqrt
from typing import Any

import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .generation_cm3leon import ImageGenerationMixin
from .image_codes_cm3leon import decode_codes
from .logits_cm3leon import ImageSpan


# Spelling of the tokens around an image, in the vocabulary of every Chameleon checkpoint.
OPENING_TOKEN = "<racm3:break>"
CLOSING_TOKEN = "<eoss>"


class DrawingChameleonForConditionalGeneration(ImageGenerationMixin, ChameleonForConditionalGeneration):
    """Chameleon with the scores of its image codes: draws images and writes text with images in between.

    Loads any checkpoint of [`~transformers.ChameleonForConditionalGeneration`]; Meta's own were published without what
    drawing needs, Anole was trained to draw again.

    Args:
        config (`ChameleonConfig`): With the `vocabulary_map` of the checkpoint.

    Raises:
        ValueError: If the vocabulary has no image codes in one range, or no tokens around images.

    Source: Chameleon (arXiv 2405.09818), sections 2.1 and 2.4; Anole (arXiv 2407.06135).

    Example:
        >>> model = DrawingChameleonForConditionalGeneration.from_pretrained(checkpoint)  # doctest: +SKIP
        >>> tokenizer = AutoTokenizer.from_pretrained(checkpoint)  # doctest: +SKIP
        >>> decoder = load_vqgan_state_dict("vqgan.ckpt")  # of the original release  # doctest: +SKIP
        >>> vq = build_vq_model_from_chameleon(model.model.vqmodel, decoder)  # doctest: +SKIP
        >>> sampling = CodeSampling(guidance_scale=3)  # doctest: +SKIP
        >>> model.draw_pictures("a red kite", tokenizer, vq, sampling=sampling)[0].save("kite.png")  # doctest: +SKIP
        >>> model.write_documents("How is a kite made?", tokenizer, vq)[0]  # doctest: +SKIP
        ['Take two sticks ...', <PIL.Image.Image image mode=RGB size=512x512 at 0x7F01>, 'and then ...']

    """

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__(config)
        ids = self.model.vocabulary_mapping.image_tokens
        if not ids or ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError("`vocabulary_map` of `config` must hold image codes, `IMGIMG...`, in one range of ids.")
        if missing := [token for token in (OPENING_TOKEN, CLOSING_TOKEN) if token not in config.vocabulary_map]:
            raise ValueError(f"`vocabulary_map` of `config` lacks {missing}, which stand around images.")

    @property
    def image_span(self) -> ImageSpan:
        """Ids and length of an image, which stands between its two delimiters."""
        vq, vocabulary = self.config.vq_config, self.config.vocabulary_map
        ids = self.model.vocabulary_mapping.image_tokens
        return ImageSpan(
            first_image_token_id=ids[0],
            image_vocab_size=len(ids),
            tokens_per_image=(vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)) ** 2,
            opening_token_ids=(vocabulary[OPENING_TOKEN],),
            closing_token_ids=(vocabulary[CLOSING_TOKEN],),
            always_opens=True,
        )

    @property
    def never_written(self) -> list[range]:
        """The placeholder of images, and padding."""
        singles = self.model.vocabulary_mapping.image_token_id, self.config.pad_token_id
        return [range(token, token + 1) for token in singles if token is not None]

    def unconditional_prompt(self) -> list[int]:
        """Ids of a document that opens with an image. Source: Chameleon's inference code, as remembered."""
        return [self.config.bos_token_id, *self.image_span.opening_token_ids]

    def replace_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Puts the codes of pictures where their placeholders stand."""
        if pixel_values is None:
            return input_ids
        ids = self.get_image_tokens(pixel_values).to(input_ids.dtype)
        is_image = input_ids == self.model.vocabulary_mapping.image_token_id
        if (count := int(is_image.sum())) != ids.numel():
            raise ValueError(
                f"`input_ids` holds {count} image placeholders; `pixel_values` gives {ids.numel()} codes."
            )
        return input_ids.masked_scatter(is_image, ids)

    def image_codes(self, image_ids: torch.Tensor) -> torch.Tensor:
        """Turns ids of the vocabulary into codes of the image tokenizer, which stand in another order.

        Args:
            image_ids (`torch.LongTensor`): From `draw_images`, of any shape.

        Returns:
            `torch.LongTensor` of the same shape: codes from 0, for the VQ decoder.
        """
        mapping = self.model.vocabulary_mapping
        codes = torch.tensor([mapping.bpe2img[token] for token in mapping.image_tokens], device=image_ids.device)
        return codes[image_ids - self.image_span.first_image_token_id]

    @torch.no_grad()
    def decode_image_tokens(self, image_ids: torch.Tensor, image_tokenizer: VQModel) -> torch.Tensor:
        """Turns ids of codes into pictures.

        Args:
            image_ids (`torch.LongTensor` of shape `(num_images, tokens_per_image)`): From `draw_images`.
            image_tokenizer (`VQModel`): From `build_vq_model_from_chameleon`.

        Returns:
            `torch.FloatTensor` of shape `(num_images, 3, height, width)`: in [-1, 1] but for overshoots.

        Raises:
            ValueError: If a picture has another number of codes, an id is no code, or the tokenizer another codebook.
        """
        span = self.image_span
        if (num_codes := image_tokenizer.config.num_vq_embeddings) != span.image_vocab_size:
            raise ValueError(
                f"`image_tokenizer` has a codebook of {num_codes} codes; the vocabulary has {span.image_vocab_size}. "
                "Build it from this model's own with `build_vq_model_from_chameleon`."
            )
        if image_ids.ndim != 2 or image_ids.shape[1] != span.tokens_per_image:
            raise ValueError(
                f"`image_ids` has shape {tuple(image_ids.shape)}; a picture of this model has {span.tokens_per_image} "
                "codes."
            )
        if not bool(span.is_code(image_ids).all()):
            raise ValueError("`image_ids` holds ids that are no image codes. Give what `draw_images` returned.")
        side = isqrt(span.tokens_per_image)
        codes = self.image_codes(image_ids).to(image_tokenizer.device)
        return decode_codes(image_tokenizer, codes.view(-1, side, side))

    def draw_pictures(
        self,
        prompt: str | list[str],
        tokenizer: PreTrainedTokenizerBase,
        image_tokenizer: VQModel,
        **draw_kwargs: Any,
    ) -> list[Image.Image]:
        """Draws pictures from prompts: from strings to PIL in one call.

        Args:
            prompt (`str` or `list[str]`): What to draw.
            tokenizer (`PreTrainedTokenizerBase`): The checkpoint's.
            image_tokenizer (`VQModel`): From `build_vq_model_from_chameleon`.
            draw_kwargs: Those of `draw_images`, such as `sampling`, `generator` and `num_images_per_prompt`.

        Returns:
            `list[PIL.Image.Image]`: those of one prompt side by side.

        Raises:
            ValueError: If an argument of `draw_images` is out of range, or the image tokenizer does not fit.
        """
        image_ids = self.draw_images(**self._tokenize(prompt, tokenizer), **draw_kwargs)
        return self._show(image_ids, image_tokenizer)

    def write_documents(
        self,
        prompt: str | list[str],
        tokenizer: PreTrainedTokenizerBase,
        image_tokenizer: VQModel,
        **generate_kwargs: Any,
    ) -> list[list[str | Image.Image]]:
        """Continues prompts with text and whole pictures, as the model decides, until it ends.

        Args:
            prompt (`str` or `list[str]`): How the documents begin.
            tokenizer (`PreTrainedTokenizerBase`): The checkpoint's.
            image_tokenizer (`VQModel`): From `build_vq_model_from_chameleon`.
            generate_kwargs: Those of `generate_interleaved`, such as `max_images` and `draw_kwargs`.

        Returns:
            `list[list[str | PIL.Image.Image]]`: for each prompt what was added, in order.

        Raises:
            ValueError: As `draw_pictures`.
        """
        documents = self.generate_interleaved(**self._tokenize(prompt, tokenizer), **generate_kwargs)
        shown = [[self._show_part(part, tokenizer, image_tokenizer) for part in parts] for parts in documents]
        return [[part for part in parts if part != ""] for parts in shown]

    def _tokenize(self, prompt: str | list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Ids and mask of prompts, padded on the left."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(self.device)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _show_part(
        self, part: torch.Tensor, tokenizer: PreTrainedTokenizerBase, image_tokenizer: VQModel
    ) -> str | Image.Image:
        """Turns one part of a document into a string or a picture."""
        if part.ndim == 2:
            return self._show(part, image_tokenizer)[0]
        delimiters = (*self.image_span.opening_token_ids, *self.image_span.closing_token_ids)
        return tokenizer.decode(
            [token for token in part.tolist() if token not in delimiters], skip_special_tokens=True
        )

    def _show(self, image_ids: torch.Tensor, image_tokenizer: VQModel) -> list[Image.Image]:
        """Turns ids of codes into pictures of PIL."""
        pixels = self.decode_image_tokens(image_ids, image_tokenizer).float()
        return VaeImageProcessor(do_resize=False).postprocess(pixels, output_type="pil")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Does what the library's forward does, without forbidding image codes; see there for the arguments."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["DrawingChameleonForConditionalGeneration"]
