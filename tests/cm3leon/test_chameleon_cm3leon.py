import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerFast
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList

from hf_mm.cm3leon.chameleon_cm3leon import DrawingChameleonForConditionalGeneration
from hf_mm.cm3leon.convert_vqgan_cm3leon import build_vq_model_from_chameleon
from hf_mm.cm3leon.logits_cm3leon import CodeSampling, ImageSpanLogitsProcessor


BOS, EOS, PAD, OPENS, CLOSES, PLACEHOLDER = 0, 2, 1, 34, 35, 36
FIRST, NUM_CODES, VOCABULARY = 5, 29, 47


def spell(code):
    """The checkpoints' spelling of a code: its digits as letters, then Z."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


# Ids of the codes run against their numbers, as they need not agree.
VOCABULARY_MAP = {
    **{spell(code): FIRST + NUM_CODES - 1 - code for code in range(NUM_CODES)},
    "<racm3:break>": OPENS,
    "<eoss>": CLOSES,
    "<image>": PLACEHOLDER,
}


def make_config(**fields):
    return ChameleonConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=61,
        initializer_range=0.4,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        vocabulary_map=VOCABULARY_MAP,
        **{
            "vq_config": {
                "resolution": 12,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_embeddings": NUM_CODES,
                "embed_dim": 6,
                "latent_channels": 6,
                "num_res_blocks": 1,
                "attn_resolutions": None,
            },
            **fields,
        },
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DrawingChameleonForConditionalGeneration(make_config()).eval()


def ids_and_mask(model):
    ids = torch.tensor([[PAD, PAD, BOS, 40, 41], [BOS, 38, 39, 40, 45]])
    return ids, (ids != PAD).long()


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_it_loads_what_the_librarys_class_saved_and_gives_its_text_logits(model, tmp_path):
    stock = ChameleonForConditionalGeneration(make_config()).eval()
    stock.save_pretrained(tmp_path)
    loaded = DrawingChameleonForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids, mask = ids_and_mask(model)
    ours, theirs = (one(ids, attention_mask=mask).logits for one in (loaded, stock))
    text = torch.ones(VOCABULARY, dtype=torch.bool)
    text[FIRST : FIRST + NUM_CODES] = False
    assert torch.equal(ours[..., text], theirs[..., text])
    assert (theirs[..., ~text] == torch.finfo(theirs.dtype).min).all() and ours.abs().max() < 1e3


def test_image_targets_have_a_finite_loss(model):
    ids = torch.tensor([[BOS, OPENS, *range(FIRST, FIRST + 9), CLOSES, EOS]])
    loss = model(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loss, expected)


def test_images_have_exactly_their_codes_and_are_the_librarys_own_sampling_without_guidance(model):
    assert model.image_span.tokens_per_image == 9
    ids, mask = ids_and_mask(model)
    images = model.draw_images(ids, mask, generator=seeded(0, 1), num_images_per_prompt=2)
    assert images.shape == (4, 9) and model.image_span.is_code(images).all()
    opened = torch.nn.functional.pad(ids, (0, 1), value=OPENS)
    greedy = model.draw_images(ids, mask, sampling=CodeSampling(do_sample=False))
    expected = GenerationMixin.generate(
        model, opened, attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), do_sample=False, max_new_tokens=10,
        logits_processor=LogitsProcessorList([ImageSpanLogitsProcessor(model.image_span)]),
    )[:, opened.shape[1] :]  # fmt: skip
    assert torch.equal(expected[:, :9], greedy) and (expected[:, 9] == CLOSES).all()


def test_guided_images_are_those_of_the_librarys_two_forwards(model):
    ids, mask = ids_and_mask(model)
    opened, opened_mask = (
        torch.nn.functional.pad(ids, (0, 1), value=OPENS),
        torch.nn.functional.pad(mask, (0, 1), value=1),
    )
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    guided = model.draw_images(ids, mask, sampling=CodeSampling(guidance_scale=3.0, do_sample=False))
    hook.remove()
    assert rows == [4] * 9
    expected = GenerationMixin.generate(
        model, opened, attention_mask=opened_mask, do_sample=False, max_new_tokens=9, guidance_scale=3.0,
        negative_prompt_ids=torch.tensor([[BOS, OPENS]] * 2),
        logits_processor=LogitsProcessorList([ImageSpanLogitsProcessor(model.image_span)]),
    )[:, opened.shape[1] :]  # fmt: skip
    assert torch.equal(guided, expected)


class KeepScores(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.clone())
        return scores


def test_logits_are_untouched_where_guidance_is_off(model):
    ids, mask = ids_and_mask(model)
    before, after = KeepScores(), KeepScores()
    torch.manual_seed(0)
    model.generate(
        ids, attention_mask=mask, guidance_scale=1, negative_prompt_ids=ids[:, :2], do_sample=True, max_new_tokens=40,
        logits_processor=LogitsProcessorList([before, ImageSpanLogitsProcessor(model.image_span, 45), after]),
    )  # fmt: skip
    for scores, kept in zip(before.seen, after.seen, strict=True):
        allowed = kept > -torch.inf
        assert torch.equal(kept[allowed], scores[allowed]) and allowed.any(-1).all()


class FavourOpening(LogitsProcessor):
    def __init__(self, amount=12):
        self.amount = amount

    def __call__(self, input_ids, scores):
        scores[:, OPENS] += self.amount
        return scores


def test_documents_of_one_call_hold_whole_images_only(model):
    ids = torch.tensor([[BOS, 40]]).expand(24, -1)
    torch.manual_seed(0)
    documents = model.generate(
        ids, do_sample=True, max_length=60, eos_token_id=EOS,
        logits_processor=LogitsProcessorList([FavourOpening(), ImageSpanLogitsProcessor(model.image_span, 60)]),
    )  # fmt: skip
    code = model.image_span.is_code(documents)
    spelled = ["".join("c" if is_code else "." for is_code in row) for row in code.tolist()]
    runs = [len(run) for row in spelled for run in row.split(".") if run]
    assert set(runs) == {9} and len(runs) > 24
    for row, codes in zip(documents.tolist(), code.tolist(), strict=True):
        for place in range(1, len(row)):
            assert codes[place] or not codes[place - 1] or row[place] == CLOSES
            assert (row[place - 1] == OPENS) == (codes[place] and not codes[place - 1])


def test_interleaved_documents_draw_their_images_with_guidance(model):
    ids, mask = ids_and_mask(model)
    documents = model.generate_interleaved(
        ids, mask, max_images=2, max_new_tokens=6, do_sample=True, eos_token_id=EOS,
        logits_processor=LogitsProcessorList([FavourOpening()]),
        draw_kwargs={"sampling": CodeSampling(guidance_scale=2.0), "generator": seeded(0)[0]},
    )  # fmt: skip
    assert any(part.ndim == 2 for parts in documents for part in parts)
    for parts in documents:
        for before, part, after in zip(parts, parts[1:], parts[2:], strict=False):
            if part.ndim == 2:
                assert part.shape == (1, 9) and model.image_span.is_code(part).all()
                assert before[-1] == OPENS and (len(after) == 0 or after[0] == CLOSES)


def test_ids_become_the_codes_that_their_names_spell(model):
    ids = torch.tensor([[FIRST, FIRST + 1, FIRST + NUM_CODES - 1]])
    assert model.image_codes(ids).tolist() == [[NUM_CODES - 1, NUM_CODES - 2, 0]]


def test_pictures_of_a_prompt_become_ids(model):
    pixels = torch.rand(1, 3, 12, 12)
    ids = torch.tensor([[BOS, OPENS, *[PLACEHOLDER] * 9, CLOSES, 40]])
    drawn = model.draw_images(ids, pixel_values=pixels, generator=seeded(0))
    placed = model.replace_images(ids, pixels)
    assert torch.equal(placed[0, 2:11], model.get_image_tokens(pixels)[0].long())
    assert torch.equal(drawn, model.draw_images(placed, generator=seeded(0)))
    with pytest.raises(ValueError, match="8 image placeholders.*9 codes"):
        model.replace_images(ids[:, 3:], pixels)


def original_decoder(width=32, latent_channels=6):
    """Random weights of the decoder of levels of one width, by the names and shapes of the original code."""
    blocks = ["mid.block_1", "mid.block_2", *[f"up.{level}.block.{number}" for level in range(3) for number in (0, 1)]]
    norms = ["norm_out", "mid.attn_1.norm", *[f"{block}.norm{number}" for block in blocks for number in (1, 2)]]
    shapes = {name: (width,) for name in norms}
    shapes |= {f"{block}.conv{number}": (width, width, 3, 3) for block in blocks for number in (1, 2)}
    shapes |= {f"up.{level}.upsample.conv": (width, width, 3, 3) for level in (1, 2)}
    shapes |= {f"mid.attn_1.{layer}": (width, width, 1, 1) for layer in ("q", "k", "v", "proj_out")}
    shapes |= {"conv_in": (width, latent_channels, 3, 3), "conv_out": (3, width, 3, 3)}
    weights = {f"decoder.{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    return weights | {f"decoder.{name}.bias": torch.randn(shape[0]) * 0.2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def vq(model):
    torch.manual_seed(1)
    vqmodel = model.model.vqmodel
    with torch.no_grad():  # entries where the encoder's vectors are, for pictures to have codes of all kinds
        vectors = vqmodel.quant_conv(vqmodel.encoder(torch.rand(4, 3, 12, 12) * 2 - 1)).permute(0, 2, 3, 1)
        vqmodel.quantize.embedding.weight.copy_(vectors.reshape(-1, 6)[:NUM_CODES])
    return build_vq_model_from_chameleon(vqmodel, original_decoder())


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": 3, "<racm3:break>": OPENS, "<eoss>": CLOSES}
    words |= {word: 38 + number for number, word in enumerate("a red blue star kite on top of it".split())}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def as_arrays(pixels):
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def test_a_picture_that_was_read_is_decoded_as_its_own_tokenizer_would(model, vq):
    pixels = torch.rand(3, 3, 12, 12) * 2 - 1
    ids = model.get_image_tokens(pixels).view(3, 9)
    assert len(ids.unique()) > 5
    torch.testing.assert_close(model.decode_image_tokens(ids, vq), vq.decode(vq.encode(pixels).latents).sample)


def test_prompts_become_pictures_in_one_call(model, vq, tokenizer):
    sampling = CodeSampling(guidance_scale=2.0, top_p=0.9)
    pictures = model.draw_pictures(
        ["a red kite", "star"], tokenizer, vq, sampling=sampling, generator=seeded(0, 1), num_images_per_prompt=2
    )
    assert [picture.size for picture in pictures] == [(12, 12)] * 4
    ids = torch.tensor([[BOS, 38, 39, 42], [PAD, PAD, BOS, 41]])
    image_ids = model.draw_images(
        ids, (ids != PAD).long(), sampling=sampling, generator=seeded(0, 1), num_images_per_prompt=2
    )
    # From the spelling of each code to its entry, with nothing of the calls in between.
    codes = torch.tensor([[FIRST + NUM_CODES - 1 - token for token in row] for row in image_ids.tolist()])
    entries = model.model.vqmodel.quantize.embedding.weight[codes].view(4, 3, 3, 6).permute(0, 3, 1, 2)
    expected = as_arrays(vq.decode(entries, force_not_quantize=True).sample.detach())
    np.testing.assert_allclose(np.stack(pictures).astype(int), expected.astype(int), atol=1)
    assert len(np.unique(np.stack(pictures).reshape(4, -1), axis=0)) > 1
    (alone,) = model.draw_pictures("star", tokenizer, vq, generator=seeded(5))
    assert alone.size == (12, 12)


def test_documents_of_the_one_call_hold_whole_pictures_and_no_delimiters(model, vq, tokenizer):
    decoded, decode = [], model.decode_image_tokens
    model.decode_image_tokens = lambda ids, vq: decoded.append(ids) or decode(ids, vq)
    torch.manual_seed(0)
    documents = model.write_documents(
        ["a red kite", "star", "it"], tokenizer, vq, max_images=2, max_new_tokens=7, do_sample=True, eos_token_id=EOS,
        logits_processor=LogitsProcessorList([FavourOpening(3)]), draw_kwargs={"generator": seeded(0)[0]},
    )  # fmt: skip
    del model.decode_image_tokens
    parts = [part for document in documents for part in document]
    pictures = [part for part in parts if not isinstance(part, str)]
    assert len(documents) == 3 and len(pictures) == len(decoded) > 2 and len(pictures) < len(parts)
    assert all(picture.size == (12, 12) for picture in pictures)
    assert all(ids.shape == (1, 9) and model.image_span.is_code(ids).all() for ids in decoded)
    assert not any("<racm3" in part or "<eoss>" in part for part in parts if isinstance(part, str))


def test_what_is_no_picture_of_this_model_is_not_decoded(model, vq):
    ids = torch.full((1, 9), FIRST)
    with pytest.raises(ValueError, match=r"image_ids.*\(1, 8\).*9 codes"):
        model.decode_image_tokens(ids[:, :8], vq)
    with pytest.raises(ValueError, match="image_ids.*no image codes"):
        model.decode_image_tokens(ids - 1, vq)
    other = type(vq)(**{**vq.config, "num_vq_embeddings": 31})
    with pytest.raises(ValueError, match="image_tokenizer.*31 codes.*29"):
        model.decode_image_tokens(ids, other)


@pytest.mark.parametrize(
    ("vocabulary_map", "match"),
    [
        ({**VOCABULARY_MAP, spell(3): 45}, "IMGIMG"),
        ({"<image>": PLACEHOLDER}, "IMGIMG"),
        ({name: token for name, token in VOCABULARY_MAP.items() if name != "<eoss>"}, "<eoss>"),
    ],
)
def test_a_vocabulary_that_cannot_draw_is_refused(vocabulary_map, match):
    config = make_config()
    config.vocabulary_map = vocabulary_map
    with pytest.raises(ValueError, match=match):
        DrawingChameleonForConditionalGeneration(config)
