from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from hf_mm.cm3leon import CM3LeonPipeline


SCALE = 2.5


@pytest.fixture
def make_pipeline(make_model, make_processor):
    def make(**fields):
        components = {name: fields.pop(name) for name in ("reranker", "reranker_processor") if name in fields}
        model = make_model(**{"max_position_embeddings": 97, **fields})
        pipe = CM3LeonPipeline(model, make_processor(model.config), **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def documents(picture):
    """Documents of a text and a picture each."""
    texts = ["a red star on a white background", "kite", "two blue boxes"]
    return [{"text": text, "image": picture(number)} for number, text in enumerate(texts)]


class FakeRetriever:
    """Finds the same documents for every prompt, and notes what it was asked."""

    def __init__(self, documents):
        self.found, self.asked = documents, []

    def retrieve(self, texts, *, num_retrieved):
        self.asked.append((list(texts), num_retrieved))
        return SimpleNamespace(documents=[self.found[:num_retrieved] for _ in texts])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def codes_of(pipe, *args, **kwargs):
    return pipe(*args, output_type="codes", **{"guidance_scale": SCALE, "generator": seeded(0), **kwargs}).images


def watch_drawing(pipe):
    """Notes the streams that the model is given, without padding: `(prompts, unconditional prompts)` of each call."""
    seen, draw = [], pipe.model.draw_images

    def note(ids, mask, **kwargs):
        streams = [[row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]]
        if "negative_input_ids" in kwargs:
            pairs = zip(kwargs["negative_input_ids"], kwargs["negative_attention_mask"], strict=True)
            by_row = [[ids[mask.bool()].tolist() for ids, mask in zip(row, keep, strict=True)] for row, keep in pairs]
            streams += map(list, zip(*by_row, strict=True))
        seen.append(streams)
        return draw(ids, mask, **kwargs)

    pipe.model.draw_images = note
    return seen


def lay_out(pipe, *parts):
    """Ids of texts, pictures and delimiters by name."""
    config, ids = pipe.model.config, []
    names = {"<eos>": [config.eos_token_id], "<break>": [config.break_token_id]}
    for part in parts:
        if not isinstance(part, str):
            ids += [code + config.first_image_token_id for code in pipe._read_codes([part])[0]]
        else:
            ids += names.get(part) or pipe.processor.tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def test_documents_stand_before_the_prompt_in_both_streams_and_the_prompt_in_one(make_pipeline, documents):
    pipe = make_pipeline()
    seen = watch_drawing(pipe)
    codes_of(pipe, "orange", retrieved=[documents[:2]])
    shown = ["<eos>"]
    for document in documents[:2]:
        shown += [document["text"], "<break>", document["image"], "<break>"]
    assert seen == [[[lay_out(pipe, *shown, "orange", "<break>")], [lay_out(pipe, *shown)]]]


def test_documents_may_be_followed_by_a_scale_of_their_own(make_pipeline, documents):
    pipe = make_pipeline()
    seen = watch_drawing(pipe)
    codes_of(pipe, ["orange", "kite"], retrieved=[documents[:1], []], image_guidance_scale=1.5)
    unknown = pipe.processor.unconditional_prompt()
    shown = ["<eos>", documents[0]["text"], "<break>", documents[0]["image"], "<break>"]
    (_, without_text, without_documents) = seen[0]
    assert without_text == [lay_out(pipe, *shown), unknown] and without_documents == [unknown] * 2
    plain = codes_of(pipe, "orange", retrieved=[documents[:1]])
    assert (codes_of(pipe, "orange", retrieved=[documents[:1]], image_guidance_scale=1.0) == plain).all()
    assert (codes_of(pipe, "orange", retrieved=[documents[:1]], image_guidance_scale=4.0) != plain).any()
    with pytest.raises(ValueError, match="needs an `image` or documents to follow"):
        pipe("orange", image_guidance_scale=2.0)


def test_a_prompt_is_the_training_document_up_to_its_picture(make_pipeline, documents):
    pipe = make_pipeline()
    seen = watch_drawing(pipe)
    drawn = codes_of(pipe, "orange", retrieved=[documents[:2]])
    content = [{"type": "text", "text": "orange"}, {"type": "image", "codes": drawn[0].tolist()}]
    shown = [
        part
        for document in documents[:2]
        for part in (
            {"type": "text", "text": document["text"]},
            {"type": "image", "codes": pipe._read_codes([document["image"]])[0]},
        )
    ]
    ((prompts, unconditional),) = seen
    for ids, last in ((prompts[0], content), (unconditional[0], content[1:])):
        whole = pipe.processor.encode_document([*shown, *last])["input_ids"]
        assert whole == [*ids, *(drawn[0] + pipe.model.config.first_image_token_id).tolist(), whole[0]]


def test_a_document_changes_the_drawing_and_so_does_the_order(make_pipeline, documents):
    pipe = make_pipeline()
    first, second, third = documents
    variants = [[], [first], [second], [first, second], [second, first], [{**first, "text": third["text"]}]]
    for scale in (1, SCALE):
        drawn = [codes_of(pipe, "kite", retrieved=[variant], guidance_scale=scale) for variant in variants]
        assert len({tuple(codes[0].tolist()) for codes in drawn}) == len(variants)


def test_documents_change_the_scores_of_either_stream(make_pipeline, documents):
    pipe = make_pipeline()
    logits = []
    for document in documents[:2]:
        rows, others = pipe._lay_out_retrieved(["kite"], [[document]], 1)
        logits += [pipe.model(torch.tensor([ids])).logits[0, -1] for ids in (rows[0], others[0][0])]
    for one in range(4):
        for other in range(one):
            assert (logits[one] - logits[other]).abs().max() > 1e-3


def test_prompts_of_one_batch_draw_as_alone_whatever_number_of_documents_each_has(make_pipeline, documents):
    pipe = make_pipeline()
    prompts, retrieved = (
        ["kite", "a red star on a white", "", "", "blue"],
        [documents[:1], [], documents[1:], [], documents[:2]],
    )
    together = codes_of(
        pipe, prompts, retrieved=retrieved, num_images_per_prompt=2, generator=[seeded(seed) for seed in range(5)]
    )
    for number, (prompt, some) in enumerate(zip(prompts, retrieved, strict=True)):
        alone = codes_of(pipe, prompt, retrieved=[some], num_images_per_prompt=2, generator=[seeded(number)])
        assert torch.equal(alone, together[2 * number : 2 * number + 2])


def test_without_documents_a_prompt_draws_as_ever(make_pipeline, documents):
    pipe = make_pipeline()
    plain = codes_of(pipe, "kite")
    retriever = FakeRetriever(documents)
    assert torch.equal(plain, codes_of(pipe, "kite", retriever=retriever, num_retrieved=0))
    assert torch.equal(plain, codes_of(pipe, "kite", num_retrieved=0))
    assert torch.equal(plain, codes_of(pipe, "kite", retrieved=[[]]))
    assert not retriever.asked
    beside = codes_of(
        pipe, ["kite", "kite"], retrieved=[[], documents[:1]], generator=[seeded(0), seeded(0)]
    )  # laid out beside one with documents
    assert torch.equal(plain, beside[:1]) and not torch.equal(plain, beside[1:])


def test_an_empty_prompt_draws_by_its_documents_alone(make_pipeline, documents):
    pipe = make_pipeline()
    drawn = [codes_of(pipe, "", retrieved=[documents[:1]], guidance_scale=scale) for scale in (1, 3)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], codes_of(pipe, ""))


def test_the_retriever_is_asked_once_for_all_prompts_and_gives_what_is_given_by_hand(make_pipeline, documents):
    pipe, retriever = make_pipeline(), FakeRetriever(documents)
    prompts = ["kite", "blue"]
    for number in (1, 2):
        drawn = codes_of(pipe, prompts, retriever=retriever, num_retrieved=number)
        assert torch.equal(drawn, codes_of(pipe, prompts, retrieved=[documents[:number]] * 2))
    assert torch.equal(drawn, codes_of(pipe, prompts, retriever=retriever))  # two unless said otherwise
    assert retriever.asked == [(prompts, 1), (prompts, 2), (prompts, 2)]


def test_an_empty_prompt_beside_others_asks_for_nothing(make_pipeline, documents):
    pipe, retriever = make_pipeline(), FakeRetriever(documents)
    drawn = codes_of(pipe, ["", "blue"], retriever=retriever, num_retrieved=1)
    assert torch.equal(drawn, codes_of(pipe, ["", "blue"], retrieved=[[], documents[:1]]))
    assert torch.equal(codes_of(pipe, "", retriever=retriever), codes_of(pipe, ""))
    assert retriever.asked == [(["blue"], 1)]


def test_codes_serve_as_well_as_pictures_and_every_picture_is_read_once(make_pipeline, documents):
    pipe = make_pipeline()
    first, second, _ = documents
    codes = pipe._read_codes([first["image"]])[0]
    expected = codes_of(pipe, ["kite", "blue"], retrieved=[[first], [first, second]])
    read, encode = [], pipe.model.encode_images
    pipe.model.encode_images = lambda pixels: read.append(len(pixels)) or encode(pixels)
    assert torch.equal(expected, codes_of(pipe, ["kite", "blue"], retrieved=[[first], [first, second]]))
    assert read == [2]
    as_codes = {"text": first["text"], "codes": torch.tensor(codes).view(4, 4)}
    assert torch.equal(expected, codes_of(pipe, ["kite", "blue"], retrieved=[[as_codes], [as_codes, second]]))
    assert read == [2, 1]


def test_a_document_may_lack_its_text_or_its_picture(make_pipeline, documents):
    pipe, picture = make_pipeline(), documents[0]["image"]
    seen = watch_drawing(pipe)
    codes_of(pipe, "blue", retrieved=[[{"text": "kite"}, {"text": "", "image": picture}]])
    shown = ["<eos>", "kite", "<break>", picture, "<break>"]
    assert seen[0] == [[lay_out(pipe, *shown, "blue", "<break>")], [lay_out(pipe, *shown)]]


def test_contrastive_decoding_and_candidates_work_behind_documents(make_pipeline, documents, clip_dir):
    clip = {
        "reranker": CLIPModel.from_pretrained(clip_dir),
        "reranker_processor": CLIPProcessor.from_pretrained(clip_dir),
    }
    pipe = make_pipeline(**clip)
    settings = {"decoding": "mixed", "contrastive_k": 3, "contrastive_alpha": 0.2, "retrieved": [documents[:1]]}
    both = codes_of(pipe, "kite", num_images_per_prompt=4, **settings)
    best = codes_of(pipe, "kite", num_candidates=4, **settings)
    assert any(torch.equal(best[0], one) for one in both)
    order = pipe._rank(["kite"], both)[0]
    assert torch.equal(best[0], both[order[0]])
    contrastive = {**settings, "decoding": "contrastive", "guidance_scale": 1}
    other = {**contrastive, "retrieved": [documents[1:2]]}
    assert not torch.equal(codes_of(pipe, "kite", **contrastive), codes_of(pipe, "kite", **other))


def test_documents_that_leave_no_room_are_refused_with_the_number_that_fits(make_pipeline, documents):
    long = make_pipeline()
    lengths = [len(part) for part in long._encode_documents([documents])[0]]
    query = len(lay_out(long, "<eos>", "blue", "<break>"))
    for fitting in (0, 1, 2):
        limit = query + sum(lengths[:fitting]) + 16
        pipe = make_pipeline(max_position_embeddings=limit)
        assert codes_of(pipe, "blue", retrieved=[documents[:fitting]]).shape == (1, 16)
        words = (
            f"`prompt`\\[1\\] with {fitting + 1} retrieved documents takes {limit - 16 + lengths[fitting]} positions"
        )
        with pytest.raises(ValueError, match=words + f".*the model has {limit}. The first {fitting} of the documents"):
            codes_of(pipe, ["", "blue"], retrieved=[[], documents[: fitting + 1]])


def test_a_prompt_too_long_by_itself_is_refused_as_ever(make_pipeline, documents):
    pipe = make_pipeline(max_position_embeddings=61)
    with pytest.raises(ValueError, match="`prompt` takes .* positions and the image 16; the model has 61"):
        codes_of(pipe, ["kite " * 50, "kite"], retrieved=[[], documents[:1]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_retrieved": 2}, "`num_retrieved`=2 needs a `retriever`"),
        ({"num_retrieved": -1, "retriever": FakeRetriever([])}, "`num_retrieved`=-1 must be at least 0"),
        ({"num_retrieved": 1, "retrieved": [[]]}, "`num_retrieved`=1 is for a `retriever`"),
        ({"retriever": FakeRetriever([]), "retrieved": [[]]}, "both given"),
        ({"retrieved": []}, "`retrieved` has 0 entries"),
        ({"retrieved": [[], []]}, "`retrieved` has 2 entries; give a list of documents for each of 1 prompts"),
        ({"retrieved": [{"text": "kite"}]}, "a list of documents for each prompt"),
        ({"retrieved": [["kite"]]}, r"`retrieved`\[0\]\[0\] is a str"),
        ({"retrieved": [[{"text": "kite", "picture": 1}]]}, r"\[0\]\[0\] has the keys \['picture'\]"),
        ({"retrieved": [[{"text": ""}]]}, "neither text nor picture"),
        ({"retrieved": [[{"text": "kite"}, {}]]}, r"\[0\]\[1\] has neither text nor picture"),
        ({"retrieved": [[{"image": 1, "codes": [1]}]]}, "both `image` and `codes`"),
        ({"retrieved": [[{"codes": [1, 2]}]]}, "has 2 entries; a picture has 16 codes"),
        ({"retrieved": [[{"text": "a <break> b"}]]}, "special token '<break>'"),
    ],
)
def test_what_is_no_document_is_refused(make_pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        make_pipeline()("kite", **arguments)


def test_a_picture_to_follow_and_documents_together_are_refused(make_pipeline, documents, picture):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="`image` and retrieved documents are both given"):
        pipe("kite", image=picture(0), retrieved=[documents[:1]])
    pipe("kite", image=picture(0), retrieved=[[]])
