import copy

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PreTrainedTokenizerFast

from hf_mm.data.tasks import conversation_parts
from hf_mm.transfusion import TransfusionImageProcessor, TransfusionProcessor
from hf_mm.transfusion.conversation_transfusion import conversation_content


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


def test_the_chat_template_shows_a_conversation_as_a_string(processor, picture):
    messages = [
        {"role": "user", "content": [text("what is"), {"type": "image"}]},
        {"role": "assistant", "content": "a kite"},
        {"role": "user", "content": "why?"},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == "what is<image>a kite</s>why?"
    first = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    messages[0]["content"][1]["image"] = picture()
    assert first == "what is<image>"
    ids = processor.apply_chat_template(messages[:1], tokenize=True)
    assert list(processor(text=first, images=picture())["input_ids"][0]) == ids[0]


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


def conversation_ids(processor, messages):
    content = conversation_content(messages)
    for part in content:
        if part["type"] == "image":
            del part["image"]
            part["size"] = (8, 8)
    return processor.encode_document(content)


CONVERSATIONS = {
    "a question": [("user", ["PICTURE", "what is it? "]), ("assistant", [" kite"])],
    "a text alone": [("system", ["be brief. "]), ("user", ["an orange"]), ("assistant", ["kite"])],
    "an edit": [("user", ["PICTURE", "make it red "]), ("assistant", ["PICTURE"])],
    "a picture last": [("user", ["what is it?", "PICTURE"]), ("assistant", ["an orange kite"])],
    "several turns": [
        ("user", ["PICTURE", "make it red"]),
        ("assistant", ["PICTURE", "done"]),
        ("user", ["an orange"]),
        ("assistant", ["kite"]),
        ("user", ["a whit", "PICTURE"]),
        ("assistant", ["e star"]),
    ],
}


@pytest.fixture(params=list(CONVERSATIONS))
def messages(request, picture):
    def part(number, value):
        return {"type": "image", "image": picture(number)} if value == "PICTURE" else text(value)

    return [
        {"role": role, "content": [part(number + 10 * turn, value) for number, value in enumerate(values)]}
        for turn, (role, values) in enumerate(CONVERSATIONS[request.param])
    ]


def test_a_conversation_has_the_ids_of_its_training_document_up_to_the_answer(processor, messages):
    document = conversation_ids(processor, messages)
    (whole,) = processor.apply_chat_template(messages, tokenize=True)
    assert whole == document["input_ids"]
    out = processor.apply_chat_template(
        messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    (asked,) = out["input_ids"].tolist()
    assert asked == whole[: len(asked)]
    num_answers = sum(document["answer_mask"][len(asked) :])
    assert num_answers >= len(whole) - len(asked) - 2 and not document["answer_mask"][len(asked) - 1]
    pictures = [part["image"] for message in messages[:-1] for part in message["content"] if "image" in part]
    assert ("pixel_values" in out) == bool(pictures)
    if pictures:
        expected = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        assert torch.equal(out["pixel_values"], expected)


def test_what_the_assistant_says_is_marked(processor, messages):
    out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert out["assistant_masks"] == [conversation_ids(processor, messages)["answer_mask"]]


def test_training_reads_conversations_as_the_processor_does(messages):
    assert conversation_content(messages) == conversation_parts(messages)


def test_an_answer_may_be_left_open(processor):
    messages = [{"role": "user", "content": "an orange"}, {"role": "assistant", "content": "kite"}]
    closed, left = (
        processor.apply_chat_template(messages, tokenize=True, continue_final_message=is_open)[0]
        for is_open in (False, True)
    )
    assert left == closed[:-1]


def test_conversations_are_padded_on_the_left(processor, picture):
    asked = [{"role": "user", "content": [{"type": "image", "image": picture(3)}, text("a red star")]}]
    short = [{"role": "user", "content": "kite"}]
    out = processor.apply_chat_template([short, asked], tokenize=True, return_dict=True, return_tensors="pt")
    assert len(out["pixel_values"]) == 1 and out["attention_mask"][1].all()
    kept = out["input_ids"][0][out["attention_mask"][0].bool()].tolist()
    assert kept == list(processor(text="kite")["input_ids"][0]) == out["input_ids"][0, -len(kept) :].tolist()


def test_pictures_of_messages_may_be_files(processor, picture, tmp_path):
    picture(3).save(tmp_path / "star.png")
    by_path, given = (
        processor.apply_chat_template(
            [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, return_tensors="pt"
        )["pixel_values"]
        for part in ({"type": "image", "path": str(tmp_path / "star.png")}, {"type": "image", "image": picture(3)})
    )
    assert torch.equal(by_path, given)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "no message"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "Message 1.*role.*'tool'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "Message 0, part 0.*'audio'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "Message 0, part 0.*image"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0, part 0.*text"),
        ([{"role": "user", "content": None}], "Message 0.*content.*None"),
        ([{"role": "user", "content": "a </s> b"}], "text.*</s>"),
        ([{"role": "user", "content": "a <image> b"}], "text.*<image>"),
    ],
)
def test_conversations_that_do_not_fit_are_refused(processor, messages, match):
    with pytest.raises(ValueError, match=match):
        processor.apply_chat_template(messages, tokenize=True)


def test_another_chat_template_is_rendered_and_tokenized_by_the_library(processor):
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "kite"}]
    ids = processor.apply_chat_template(messages, template, tokenize=True)
    assert ids[0] == processor(text="user: kite")["input_ids"][0]


def test_the_layout_without_an_instruction_keeps_the_words_of_the_task(processor):
    assert processor.textless_prompt("a star") == "<image>"
    assert processor.textless_prompt("depth<image>a star") == "depth<image>"
    processor.edit_template = "Edit<image>now {prompt}"
    assert processor.textless_prompt("a star") == "Edit<image>now "
