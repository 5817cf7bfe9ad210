import copy

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, PreTrainedTokenizerFast

from hf_mm.cm3leon import CM3LeonConfig, CM3LeonImageProcessor, CM3LeonProcessor, extend_tokenizer
from hf_mm.cm3leon.conversation_cm3leon import conversation_content
from hf_mm.data.tasks import conversation_parts


CODES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 22]


@pytest.fixture
def processor(make_config, make_processor):
    return make_processor(make_config())


@pytest.fixture
def say(processor):
    """Tokens of ids, runs of codes and of placeholders by their length."""

    def spell(ids):
        words = []
        for token in processor.tokenizer.convert_ids_to_tokens(list(ids)):
            kind = "codes" if token.startswith("<code:") else "holes" if token == "<image>" else None
            if kind and words and words[-1].startswith(kind):
                words[-1] = f"{kind} {int(words[-1].split()[1]) + 1}"
            else:
                words.append(f"{kind} 1" if kind else token)
        return " ".join(words)

    return spell


def text(value, **fields):
    return {"type": "text", "text": value, **fields}


def image(codes=CODES, **fields):
    return {"type": "image", "codes": codes, **fields}


MASK = {"type": "mask"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([text("kite"), image()], "</s> kite <break> codes 16 </s>"),
        ([image(), text("kite")], "</s> codes 16 <break> kite </s>"),
        ([text("kite")], "</s> kite </s>"),
        ([image(), image()], "</s> codes 16 <break> codes 16 </s>"),
        ([text("a"), image(), text("b"), image()], "</s> a <break> codes 16 <break> b <break> codes 16 </s>"),
        ([text("ki"), text("te"), image()], "</s> kite <break> codes 16 </s>"),
        ([text(""), image(), text("")], "</s> codes 16 </s>"),
        ([text("kite"), {"type": "image"}], "</s> kite <break> holes 16 </s>"),
        ([], "</s> </s>"),
    ],
)
def test_documents_are_parts_with_breaks_between_and_delimiters_around(processor, say, content, expected):
    assert say(processor.encode_document(content)["input_ids"]) == expected.replace(
        "kite", say(processor._encode_text("kite"))
    )


END_OF_TURN = {"type": "end_of_turn"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([text("kite", is_answer=True), image()], "kite <break>"),
        ([text("a"), text("kite", is_answer=True), text("."), image()], "kite"),
        ([text("a: "), text("kite", is_answer=True), image()], "Ġ kite <break>"),
        ([text("edit"), image(), text("b"), image(is_answer=True)], "codes 16 </s>"),
        ([text("edit"), image(is_answer=True), text("b")], "codes 16 <break>"),
        (
            [text("a"), text("b", is_answer=True), END_OF_TURN, text("c"), text("d", is_answer=True)],
            "b <break> d </s>",
        ),
        ([text("a"), {"type": "image", "is_answer": True}, END_OF_TURN, text("c")], "holes 16 <break>"),
        ([text("a", is_answer=False), image()], ""),
        ([text("", is_answer=True)], ""),
    ],
)
def test_answers_are_marked_with_what_ends_them(processor, say, content, expected):
    out = processor.encode_document(content)
    assert len(out["answer_mask"]) == len(out["input_ids"]) == len(out["labels"])
    kept = [token for token, mark in zip(out["input_ids"], out["answer_mask"], strict=True) if mark]
    assert say(kept) == expected.replace("Ġ kite", say(processor._encode_text(" kite"))).replace(
        "kite", say(processor._encode_text("kite"))
    )


def test_documents_without_answers_have_no_mask_and_answers_change_no_id(processor):
    plain = [text("what is it?"), image()]
    out = processor.encode_document(plain)
    answered = processor.encode_document([text("what is it?", is_answer=True), image(is_answer=None)])
    assert out.keys() == {"input_ids", "labels"}
    assert {name: answered[name] for name in out} == out


def test_a_prompt_that_ends_before_the_answer_has_the_same_ids(processor):
    for question in ("an orange ", "a whit"):  # with what stands behind they would be other tokens
        document = processor.encode_document([text(question), text("kite", is_answer=True)])
        prompt = processor(text=question.rstrip())["input_ids"][0]
        assert document["input_ids"][: len(prompt)] == list(prompt)
        assert not any(document["answer_mask"][: len(prompt)]) and document["answer_mask"][len(prompt)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([text("a"), text("b"), END_OF_TURN, text("c")], "</s> a b <break> c </s>"),
        (
            [text("a"), image(), END_OF_TURN, text("c"), image()],
            "</s> a <break> codes 16 <break> c <break> codes 16 </s>",
        ),
        ([text("a"), END_OF_TURN, image(), END_OF_TURN], "</s> a <break> codes 16 </s>"),
    ],
)
def test_turns_have_one_break_between(processor, say, content, expected):
    content = [{**part, "is_answer": part.get("text") == "b"} for part in content]
    assert say(processor.encode_document(content)["input_ids"]) == expected


def test_edits_are_laid_out_by_the_template_unless_they_have_a_place_themselves(
    processor, make_config, code_tokenizer, tmp_path
):
    assert processor.edit_prompt("a {red} star") == "<image>a {red} star"
    template = "Edit<image>now: {prompt}"
    CM3LeonProcessor(processor.image_processor, code_tokenizer, edit_template=template).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.edit_prompt("a {red} star") == "Edit<image>now: a {red} star"
    assert again.edit_prompt("depth<image>a star") == "depth<image>a star"


@pytest.mark.parametrize("template", ["{prompt}", "<image>", "<image>{prompt}<image>", "{prompt}<image>{prompt}"])
def test_an_edit_template_without_its_places_is_refused(processor, code_tokenizer, template):
    with pytest.raises(ValueError, match="edit_template.*'<image>'.*'{prompt}'"):
        CM3LeonProcessor(processor.image_processor, code_tokenizer, edit_template=template)


def test_every_token_but_the_first_is_a_target(processor):
    out = processor.encode_document([text("kite"), image()])
    assert out["labels"] == [-100, *out["input_ids"][1:]]


def test_codes_are_ids_from_the_first_one_in_any_shape(processor):
    expected = processor.encode_document([image()])["input_ids"]
    assert expected[1:-1] == [processor.first_image_token_id + code for code in CODES]
    for codes in (np.array(CODES).reshape(4, 4), torch.tensor(CODES), np.array(CODES, dtype=np.uint16)):
        out = processor.encode_document([image(codes)])["input_ids"]
        assert out == expected and all(type(token) is int for token in out)


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (CODES[:-1], "codes.*15 entries.*16 codes, 4 rows of 4"),
        ([*CODES, 1], "codes.*17 entries.*16 codes"),
        ([], "codes.*0 entries"),
        ([*CODES[:-1], 23], "codes.*23; the codebook.*23 entries"),
        ([*CODES[:-1], -1], "codes.*from -1"),
    ],
)
def test_codes_that_do_not_fit_the_model_are_refused(processor, codes, match):
    with pytest.raises(ValueError, match=match):
        processor.encode_document([image(codes)])


@pytest.mark.parametrize(
    ("content", "expected", "lengths"),
    [
        ([MASK, image()], "</s> <sentinel:0> <break> codes 16 </s> <sentinel:0>", [None]),
        ([text("a"), MASK, text("b"), image()], "</s> a <sentinel:0> b <break> codes 16 </s> <sentinel:0>", [None]),
        ([text("a"), image(mask=[True] * 16)], "</s> a <break> <sentinel:0> </s> <sentinel:0>", [16]),
        (
            [MASK, image(mask=[0, 1, 1, 0] + [0] * 4 + [1] * 3 + [0] * 5)],
            "</s> <sentinel:0> <break> codes 1 <sentinel:1> codes 5 <sentinel:2> codes 5 </s> <sentinel:0>",
            [None, 2, 3],
        ),
        ([MASK, {"type": "image"}], "</s> <sentinel:0> <break> holes 16 </s> <sentinel:0>", [None]),
    ],
)
def test_prompts_for_filling_in_name_what_is_missing(processor, say, content, expected, lengths):
    out = processor.infill_prompt(content)
    assert say(out["input_ids"]) == expected and out["span_lengths"] == lengths


def test_filled_in_spans_make_the_whole_document(processor):
    mask = processor.box_mask((2, 2, 5, 6))
    assert np.flatnonzero(mask).tolist() == [5, 6, 9, 10]
    whole = processor.encode_document([text("a kite"), image()])["input_ids"]
    prompt = processor.infill_prompt([MASK, image(mask=mask)])
    caption = processor._encode_text("a kite")
    codes = processor.encode_codes(CODES)
    assert prompt["span_lengths"] == [None, 2, 2]
    assert processor.fill_in(prompt["input_ids"], [caption, codes[5:7], codes[9:11]]) == whole
    with pytest.raises(ValueError, match="spans.*2 entries.*misses 3"):
        processor.fill_in(prompt["input_ids"], [caption, codes[5:7]])


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 0, 9, 4), (3, 0, 3, 4), (0, 4, 4, 2)])
def test_a_box_outside_the_picture_is_refused(processor, box):
    with pytest.raises(ValueError, match="box.*8 x 8 pixels"):
        processor.box_mask(box)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([text("a"), image()], "content.*nothing to fill in"),
        ([image(mask=[True, False] * 8)], "content.*sentinels, 7"),
        ([image(mask=[True] * 15)], "mask.*15 entries.*16 codes"),
        ([{"type": "video"}], "type.*'video'.*'mask'"),
    ],
)
def test_prompts_that_cannot_be_filled_in_are_refused(processor, content, match):
    with pytest.raises(ValueError, match=match):
        processor.infill_prompt(content)


def test_a_part_of_no_known_type_is_refused_in_documents(processor):
    for kind in ("video", "mask"):
        with pytest.raises(ValueError, match=f"type.*'{kind}'.*'text', 'image'"):
            processor.encode_document([{"type": kind}])


@pytest.mark.parametrize(
    "content",
    [
        [text("a red star"), image()],
        [image(), text("a kite"), image(CODES[::-1]), image()],
        [text(" two  spaces, ümläut ☂")],
        [],
    ],
)
def test_a_document_is_read_back_as_it_was(processor, content):
    ids = processor.encode_document(content)["input_ids"]
    assert processor.split_document(ids) == content
    pad = processor.tokenizer.pad_token_id
    assert processor.split_document([pad, pad, *ids, pad]) == content
    assert processor.split_document(torch.tensor(ids).tolist()[:-1]) == content
    assert processor.split_document([*ids, processor.first_sentinel_token_id, ids[0]]) == content


def test_the_unconditional_prompt_is_an_unknown_text_before_a_picture(processor, say):
    assert say(processor.unconditional_prompt()) == "</s> <sentinel:0> <break>"


def test_a_prompt_begins_like_its_training_document(processor, tokenizer):
    prompt = processor(text="a red star", return_tensors="pt")["input_ids"][0].tolist()
    document = processor.encode_document([text("a red star"), image()])["input_ids"]
    assert prompt == document[: len(prompt)] and document[len(prompt)] == processor.tokenizer.break_token_id


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<image>a", "</s> holes 16 <break> a"),
        ("a<image>", "</s> a <break> holes 16"),
        ("a<image>b<image>", "</s> a <break> holes 16 <break> b <break> holes 16"),
        ("<image><image>a", "</s> holes 16 <break> holes 16 <break> a"),
        ("<image>", "</s> <sentinel:0> <break> holes 16 </s> <sentinel:0>"),
        ("a", "</s> a"),
        ("", "</s>"),
    ],
)
def test_prompts_with_pictures_are_laid_out_like_documents(processor, say, picture, prompt, expected):
    count = prompt.count("<image>")
    out = processor(text=prompt, images=[picture(seed) for seed in range(count)] or None, return_tensors="pt")
    assert say(out["input_ids"][0].tolist()) == expected
    assert ("pixel_values" in out) == bool(count) and out["attention_mask"].all()
    if count:
        assert out["pixel_values"].shape == (count, 3, 8, 8)


def test_pictures_alone_ask_for_their_captions(processor, say, picture):
    out = processor(images=[picture(0), picture(1)], return_tensors="pt")
    assert out["input_ids"].shape == (2, 1 + 1 + 1 + 16 + 2)
    expected = processor.infill_prompt([MASK, {"type": "image"}])["input_ids"]
    assert out["input_ids"].tolist() == [expected, expected]


def test_a_text_is_tokenized_alike_in_prompts_and_documents_where_its_place_matters(tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "▁a", "a", "▁b", "b"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # marks only what begins a string
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    image_processor = CM3LeonImageProcessor(crop_size={"height": 8, "width": 8}, vq_stride=4)
    processor = CM3LeonProcessor(image_processor, extend_tokenizer(plain, 23, 7))
    document = processor.encode_document([text("a b"), {"type": "image"}, text("b a")])["input_ids"]
    prompt = processor(text="a b<image>b a", images=torch.zeros(3, 8, 8), do_rescale=False)["input_ids"][0]
    assert list(prompt) == document[:-1]


def test_prompts_are_padded_on_the_left(processor):
    out = processor(text=["a red star", "kite"], padding=True, return_tensors="pt")
    short = processor(text="kite", return_tensors="pt")["input_ids"][0]
    assert torch.equal(out["input_ids"][1, -len(short) :], short)
    assert (out["input_ids"][1, : -len(short)] == processor.tokenizer.pad_token_id).all()
    assert out["attention_mask"].sum(-1).tolist() == [out["input_ids"].shape[1], len(short)]


@pytest.mark.parametrize("token", ["</s>", "<pad>", "<break>", "<eoss>", "<code:7>", "<sentinel:0>", "<s>"])
def test_text_that_spells_a_special_token_is_refused(processor, token):
    with pytest.raises(ValueError, match=rf"text.*\[1\].*'{token}'"):
        processor(text=["kite", f"a {token} star"], return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match=f"text.*'{token}'"):
        processor.encode_document([text(f"a {token} star")])


def test_a_literal_image_token_is_refused_in_training_text(processor):
    with pytest.raises(ValueError, match="text.*<image>"):
        processor.encode_document([text("<image>")])


def test_text_that_only_looks_like_a_special_token_is_text(processor):
    for value in ("<code:23>", "<sentinel:7>", "< break>", "<code:>"):
        assert processor.split_document(processor.encode_document([text(value)])["input_ids"]) == [text(value)]


@pytest.mark.parametrize(("prompt", "count"), [("kite", 1), ("<image>", 2), ("<image><image>", 1), ("a <image>", 0)])
def test_another_number_of_pictures_than_placeholders_is_refused(processor, picture, prompt, count):
    with pytest.raises(ValueError, match="(?i)image"):
        processor(text=prompt, images=[picture(seed) for seed in range(count)] or None, return_tensors="pt")


def test_a_size_that_gives_another_number_of_codes_is_refused(processor, picture):
    with pytest.raises(ValueError, match="images.*12 x 12.*36 codes.*16 codes"):
        processor(images=picture(), size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})


def test_extending_keeps_the_ids_that_there_were_and_leaves_the_text_tokenizer_alone(tokenizer):
    length = len(tokenizer)
    extended = extend_tokenizer(tokenizer, 23, 7)
    assert len(tokenizer) == length and "<code:0>" not in tokenizer.get_vocab()
    assert extended("a red star")["input_ids"] == tokenizer("a red star")["input_ids"]
    assert extended.image_token_id == tokenizer.image_token_id and extended.boi_token_id == tokenizer.boi_token_id
    assert len(extended) == length + 2 + 23 + 7
    assert extended("<code:22><break><sentinel:6>")["input_ids"] == [length + 2 + 22, length, length + 2 + 23 + 6]
    assert extended.decode(extended("a <code:3><eoss> star")["input_ids"], skip_special_tokens=True) == "a  star"


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer, make_config):
    with pytest.raises(
        ValueError, match=r"tokenizer.*break_token.*eoss_token.*<code:0>.*<sentinel:0>.*extend_tokenizer"
    ):
        CM3LeonProcessor(CM3LeonImageProcessor(), tokenizer)
    plain = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), eos_token="</s>")
    with pytest.raises(ValueError, match="tokenizer.*pad_token"):
        CM3LeonProcessor.from_config(make_config(), plain)


def test_from_config_adds_what_a_text_tokenizer_lacks_and_keeps_what_fits(tokenizer, code_tokenizer, make_config):
    config = make_config()
    first, second = (CM3LeonProcessor.from_config(config, each) for each in (tokenizer, code_tokenizer))
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert first.tokens_per_image() == 17 and first.codes_per_image() == config.tokens_per_image == 16
    assert CM3LeonProcessor.from_config(CM3LeonConfig(), tokenizer).codes_per_image() == 1024


def test_a_tokenizer_of_another_codebook_is_refused(tokenizer, make_config):
    with pytest.raises(ValueError, match="tokenizer.*29 codes.*image_vocab_size.*23"):
        CM3LeonProcessor.from_config(make_config(), extend_tokenizer(tokenizer, 29, 7))


def test_the_processor_survives_saving(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    for again in (CM3LeonProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is CM3LeonProcessor
        inputs = {"text": ["<image>kite", "a star<image>"], "images": [picture(0), picture(1)], "padding": True}
        first, second = processor(**inputs, return_tensors="pt"), again(**inputs, return_tensors="pt")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert again.encode_document([text("a kite"), image()]) == processor.encode_document([text("a kite"), image()])
        with pytest.raises(ValueError, match="<sentinel:0>"):
            again(text="<sentinel:0>")
        assert again.tokenizer.decode(second["input_ids"][0], skip_special_tokens=True) == "kite"


def test_the_chat_template_shows_a_conversation_as_a_string(processor, picture):
    messages = [
        {"role": "user", "content": [text("what is"), {"type": "image"}]},
        {"role": "assistant", "content": "a kite"},
        {"role": "user", "content": "why?"},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == "what is<image>a kite<break>why?"
    first = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    messages[0]["content"][1]["image"] = picture()
    assert first == "what is<image>"
    ids = processor.apply_chat_template(messages[:1], tokenize=True)
    assert list(processor(text=first, images=picture())["input_ids"][0]) == ids[0]


def test_pictures_come_back_in_every_form(processor):
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).expand(2, 3, 2, 2)
    pil, array, tensor = (processor.post_process_images(pixels, name) for name in ("pil", "np", "pt"))
    assert [np.asarray(each)[..., 0].tolist() for each in pil] == [[[0, 0], [128, 255]]] * 2
    assert array.shape == (2, 2, 2, 3) and array.min() == 0 and array.max() == 1
    assert tensor.shape == (2, 3, 2, 2) and torch.equal(tensor[0, 0], torch.tensor([[0, 0], [0.5, 1]]))
    drawn = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(pil[0]))


def test_written_ids_come_back_as_strings(processor):
    ids = processor(text=["a red star", "kite"], padding=True, return_tensors="pt")["input_ids"]
    assert processor.post_process_multimodal_output(ids) == ["a red star", "kite"]


def test_a_text_models_tokenizer_adds_no_second_beginning(code_tokenizer):
    tokenizer = copy.deepcopy(code_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("a star")["input_ids"][-1] == tokenizer.eos_token_id
    processor = CM3LeonProcessor(CM3LeonImageProcessor(), tokenizer)
    assert (
        list(processor(text=["a star"])["input_ids"][0])
        == processor.encode_document([text("a star")])["input_ids"][:-1]
    )


def conversation_ids(processor, messages):
    content = conversation_content(messages)
    for part in content:
        if part["type"] == "image":
            del part["image"]
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
