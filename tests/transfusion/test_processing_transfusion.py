import copy

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PreTrainedTokenizerFast

from hf_mm.transfusion import TransfusionImageProcessor, TransfusionProcessor


@pytest.fixture
def processor(make_config, make_processor):
    return make_processor(make_config())


def test_a_prompt_begins_like_its_training_document(processor, tokenizer):
    prompt = processor(text="a red star", return_tensors="pt")
    document = processor.encode_document([{"type": "text", "text": "a red star"}, {"type": "image", "size": (4, 6)}])
    length = prompt["input_ids"].shape[1]
    assert prompt["input_ids"][0].tolist() == document["input_ids"][:length]
    assert document["input_ids"][length:] == [
        tokenizer.boi_token_id,
        *[tokenizer.image_token_id] * 6,
        tokenizer.eoi_token_id,
        tokenizer.eos_token_id,
    ]
    assert prompt["attention_mask"].all()


def test_a_prompt_with_a_picture_begins_like_its_training_document(processor, picture):
    prompt = processor(text="<image>a red star", images=picture(), return_tensors="pt")
    document = processor.encode_document([{"type": "image", "size": (8, 8)}, {"type": "text", "text": "a red star"}])
    assert prompt["input_ids"][0].tolist() == document["input_ids"][:-1]
    assert prompt["pixel_values"].shape == (1, 3, 8, 8)


def test_labels_are_the_text_the_openings_and_the_end(processor, tokenizer):
    content = [{"type": "image", "size": (2, 4)}, {"type": "text", "text": "kite"}, {"type": "image", "size": (2, 2)}]
    out = processor.encode_document(content)
    text = tokenizer("kite")["input_ids"]
    boi, eos, ignored = tokenizer.boi_token_id, tokenizer.eos_token_id, -100
    assert out["labels"] == [ignored, boi, ignored, ignored, ignored, *text, boi, ignored, ignored, eos]
    assert all(label in (ignored, token) for token, label in zip(out["input_ids"], out["labels"], strict=True))


def text(value, **fields):
    return {"type": "text", "text": value, **fields}


def image(height, width, **fields):
    return {"type": "image", "size": (height, width), **fields}


END_OF_TURN = {"type": "end_of_turn"}


@pytest.fixture
def marked(processor):
    """Tokens of a document that its `answer_mask` marks, joined."""

    def spell(content):
        out = processor.encode_document(content)
        assert len(out["answer_mask"]) == len(out["input_ids"]) == len(out["labels"])
        kept = [token for token, mark in zip(out["input_ids"], out["answer_mask"], strict=True) if mark]
        return processor.tokenizer.decode(kept)

    return spell


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([image(2, 4), text("what is it? "), text("kite", is_answer=True)], " kite</s>"),
        ([image(2, 4), text("edit"), image(2, 6, is_answer=True)], "<boi><image><image><image></s>"),
        ([text("kite", is_answer=True), text("."), image(2, 2)], "kite"),
        ([text("a"), text("b", is_answer=True), END_OF_TURN, text("c"), text("d", is_answer=True)], "b</s>d</s>"),
        ([text("a"), text("b", is_answer=True), END_OF_TURN, text("c")], "b</s>"),
        ([text("a", is_answer=False)], ""),
    ],
)
def test_answers_are_marked_with_what_ends_them(marked, content, expected):
    assert marked(content) == expected


def test_documents_without_answers_have_no_mask_and_answers_change_no_id(processor):
    plain = [image(2, 4), text("what is it?"), text(" kite")]
    out = processor.encode_document(plain)
    answered = processor.encode_document([*plain[:2], text(" kite", is_answer=True)])
    assert out.keys() == {"input_ids", "labels"}
    assert {name: answered[name] for name in out} == out


def test_a_prompt_that_ends_before_the_answer_has_the_same_ids(processor):
    for question in ("an orange ", "a whit"):  # with what stands behind they would be other tokens
        document = processor.encode_document([text(question), text("kite", is_answer=True)])
        prompt = processor(text=question.rstrip())["input_ids"][0]
        assert document["input_ids"][: len(prompt)] == list(prompt)
        assert not any(document["answer_mask"][: len(prompt)]) and document["answer_mask"][len(prompt)]


def test_turns_end_in_the_end_of_a_document_which_is_written_once(processor, tokenizer):
    content = [text("a"), text("b", is_answer=True), END_OF_TURN]
    whole = processor.encode_document([*content, text("c")])
    assert whole["input_ids"].count(tokenizer.eos_token_id) == 2
    assert whole["labels"] == [-100, *whole["input_ids"][1:]]
    assert processor.encode_document(content) == processor.encode_document(content[:-1])


def test_edits_are_laid_out_by_the_template_unless_they_have_a_place_themselves(processor, tokenizer, tmp_path):
    assert processor.edit_prompt("a {red} star") == "<image>a {red} star"
    template = "Edit<image>now: {prompt}"
    TransfusionProcessor(TransfusionImageProcessor(), tokenizer, edit_template=template).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.edit_prompt("a {red} star") == "Edit<image>now: a {red} star"
    assert again.edit_prompt("depth<image>a star") == "depth<image>a star"


@pytest.mark.parametrize("template", ["{prompt}", "<image>", "<image>{prompt}<image>", "{prompt}<image>{prompt}"])
def test_an_edit_template_without_its_places_is_refused(tokenizer, template):
    with pytest.raises(ValueError, match="edit_template.*'<image>'.*'{prompt}'"):
        TransfusionProcessor(TransfusionImageProcessor(), tokenizer, edit_template=template)


def test_an_empty_document_is_its_beginning_and_end(processor, tokenizer):
    assert processor.encode_document([])["input_ids"] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert processor(text="", return_tensors="pt")["input_ids"].tolist() == [[tokenizer.bos_token_id]]


def test_prompts_are_padded_on_the_left(processor, tokenizer):
    out = processor(text=["a red star", "kite"], padding=True, return_tensors="pt")
    short = processor(text="kite", return_tensors="pt")["input_ids"][0]
    assert torch.equal(out["input_ids"][1, -len(short) :], short)
    assert out["attention_mask"].sum(-1).tolist() == [out["input_ids"].shape[1], len(short)]
    assert (out["input_ids"][1, : -len(short)] == tokenizer.pad_token_id).all()


def test_pictures_of_different_sizes_take_as_many_places_as_they_have_patches(tokenizer, picture):
    image_processor = TransfusionImageProcessor(do_resize=False, do_center_crop=False, patch_size=2, vae_stride=2)
    processor = TransfusionProcessor(image_processor, tokenizer)
    images = [picture(0, 8, 12), picture(1, 4, 16)]
    ids = processor(text="<image>kite<image>", images=images, return_tensors="pt")["input_ids"][0].tolist()
    first, second = (
        tokenizer("kite")["input_ids"][0],
        [index for index, token in enumerate(ids) if token == tokenizer.boi_token_id],
    )
    assert ids.count(tokenizer.image_token_id) == 6 + 4
    assert ids[second[0] + 8] == first and second[1] + 6 == len(ids)


def test_pictures_alone_are_prompts_of_their_own(processor, picture):
    out = processor(images=[picture(0), picture(1)], return_tensors="pt")
    assert out["input_ids"].shape == (2, 1 + 16 + 2) and out["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("token", ["<s>", "</s>", "<pad>", "<boi>", "<eoi>"])
def test_a_literal_special_token_is_refused(processor, token):
    with pytest.raises(ValueError, match=rf"text.*\[1\].*{token}"):
        processor(text=["kite", f"a {token} star"], return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match=f"text.*{token}"):
        processor.encode_document([{"type": "text", "text": f"a {token} star"}])


def test_a_literal_image_token_is_refused_in_training_text(processor):
    with pytest.raises(ValueError, match="text.*<image>"):
        processor.encode_document([{"type": "text", "text": "<image>"}])


@pytest.mark.parametrize(("text", "count"), [("kite", 1), ("<image>", 2), ("<image><image>", 1)])
def test_another_number_of_pictures_than_placeholders_is_refused(processor, picture, text, count):
    with pytest.raises(ValueError, match="(?i)image"):
        processor(text=text, images=[picture(seed) for seed in range(count)], return_tensors="pt")


def test_a_placeholder_without_a_picture_is_refused(processor):
    with pytest.raises(ValueError, match="(?i)image"):
        processor(text="a <image> star", return_tensors="pt")


def test_a_part_that_is_neither_text_nor_image_is_refused(processor):
    with pytest.raises(ValueError, match="type.*'video'"):
        processor.encode_document([{"type": "video"}])


@pytest.mark.parametrize("size", [(3, 4), (4, 5), (0, 4)])
def test_an_image_off_the_patch_grid_is_refused(processor, size):
    with pytest.raises(ValueError, match="size.*patch size 2"):
        processor.encode_document([{"type": "image", "size": size}])


def test_a_tokenizer_without_image_tokens_is_refused(tokenizer):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(ValueError, match="tokenizer.*pad_token.*boi_token.*eoi_token.*image_token"):
        TransfusionProcessor(TransfusionImageProcessor(), plain)


def test_the_processor_survives_saving(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    for again in (TransfusionProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(again, TransfusionProcessor)
        inputs = {"text": ["<image>kite", "a star<image>"], "images": [picture(0), picture(1)], "padding": True}
        first, second = processor(**inputs, return_tensors="pt"), again(**inputs, return_tensors="pt")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert again.tokenizer.boi_token_id == processor.tokenizer.boi_token_id


def test_the_chat_template_puts_pictures_where_they_stand(processor, picture, tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "image"}]},
        {"role": "assistant", "content": "a kite"},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == "what is<image>\na kite"
    out = processor(
        text=processor.apply_chat_template(messages, tokenize=False), images=picture(), return_tensors="pt"
    )
    assert out["input_ids"][0].tolist().count(tokenizer.image_token_id) == 16


def test_pictures_come_back_in_every_form(processor):
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).expand(2, 3, 2, 2)
    pil, array, tensor = (processor.post_process_images(pixels, name) for name in ("pil", "np", "pt"))
    assert [np.asarray(image)[..., 0].tolist() for image in pil] == [[[0, 0], [128, 255]]] * 2
    assert array.shape == (2, 2, 2, 3) and array.min() == 0 and array.max() == 1
    assert tensor.shape == (2, 3, 2, 2) and torch.equal(tensor[0, 0], torch.tensor([[0, 0], [0.5, 1]]))
    assert np.array_equal(
        np.asarray(processor.post_process_multimodal_output(pixels, generation_mode="image")[0]), np.asarray(pil[0])
    )


def test_written_ids_come_back_as_strings(processor):
    ids = processor(text=["a red star", "kite"], padding=True, return_tensors="pt")["input_ids"]
    assert processor.post_process_multimodal_output(ids) == ["a red star", "kite"]


def test_a_text_models_tokenizer_adds_no_second_beginning(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("a star")["input_ids"][-1] == tokenizer.eos_token_id
    processor = TransfusionProcessor(TransfusionImageProcessor(), tokenizer)
    prompt = processor(text=["a star"])["input_ids"][0]
    assert list(prompt) == processor.encode_document([{"type": "text", "text": "a star"}])["input_ids"][:-1]
