import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_mm.data.cm3_masking import CM3Masking, unmask_document
from hf_mm.data.formats import RowError
from hf_mm.data.mixing import DocumentArguments, SampleKey
from hf_mm.data.training_documents import CodeDocuments, NoisedDocuments, see_all_but_one


PAD, BOS, EOS, BOI, EOI, IMAGE = range(6)


class LetterProcessor:
    """A stub that makes each letter a token and each image a run of its pixels by 4."""

    def encode_document(self, content):
        ids, labels = [BOS], [-100]
        for part in content:
            if part["type"] == "text":
                letters = [6 + ord(letter) for letter in part["text"]]
                ids, labels = ids + letters, labels + letters
            else:
                count = part["size"][0] * part["size"][1] // 4
                ids, labels = ids + [BOI] + [IMAGE] * count + [EOI], labels + [BOI] + [-100] * (count + 1)
        return {"input_ids": [*ids, EOS], "labels": [*labels, EOS]}


def draw_times(num_images, max_timestep=None, generator=None):
    return torch.rand(num_images, generator=generator) * (1000 if max_timestep is None else max_timestep)


def documents_of(rows, latent_shape=(3, 4, 4), image_size=4, **fields):
    fields = {"arguments": DocumentArguments(image_first_share=0, caption_dropout=0), "seed": 3, **fields}
    return NoisedDocuments(
        rows,
        processor=LetterProcessor(),
        image_size=image_size,
        latent_shape=latent_shape,
        sample_timesteps=draw_times,
        **fields,
    )


def pixels(seed, height=4, width=4):
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def encoded_rows(count=5):
    return [{"pixels": pixels(seed), "text": "abcdefg"[: seed + 1]} for seed in range(count)]


def test_pixels_are_scaled_to_minus_one_to_one():
    (image,) = documents_of(encoded_rows())[SampleKey(0, 0, 2)]["images"]
    np.testing.assert_allclose(image.numpy(), pixels(2) / 127.5 - 1, atol=1e-6)


def test_pictures_are_cropped_resized_and_scaled():
    rows = [{"image": Image.new("RGB", (13, 7), (255, 0, 51)), "text": "a"}]
    (image,) = documents_of(rows)[SampleKey(0, 0, 0)]["images"]
    assert image.shape == (3, 4, 4)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_latents_are_drawn_around_their_mean_and_anew_for_every_sample():
    mean, std = np.full((5, 2, 6), 2.0, np.float16), np.full((5, 2, 6), 0.5, np.float16)
    dataset = documents_of([{"latent_mean": mean, "latent_std": std, "text": "a"}], latent_shape=(5, 2, 2))
    draws = torch.stack([dataset[SampleKey(number, 0, 0)]["images"][0] for number in range(300)])
    assert draws.shape == (300, 5, 2, 6)
    assert abs(draws.mean() - 2) < 0.02 and abs(draws.std() - 0.5) < 0.02


def test_latents_are_their_mean_where_they_are_not_sampled():
    mean, std = np.full((5, 2, 6), 2.0, np.float16), np.full((5, 2, 6), 0.5, np.float16)
    arguments = DocumentArguments(image_first_share=0, caption_dropout=0, samples_latents=False)
    rows = [{"latent_mean": mean, "latent_std": std, "text": "a"}]
    dataset = documents_of(rows, latent_shape=(5, 2, 2), arguments=arguments)
    for number in range(3):
        np.testing.assert_array_equal(dataset[SampleKey(number, 0, 0)]["images"][0], mean)


@pytest.mark.parametrize("channels", [3, 5])
def test_pictures_for_a_vae_get_noise_of_its_latents_shape(channels):
    rows = [{"image": Image.new("RGB", (8, 8)), "text": "a"}]
    document = documents_of(rows, image_size=8, latent_shape=(channels, 4, 4))[SampleKey(0, 0, 0)]
    assert document["images"][0].shape == (3, 8, 8) and document["noise"][0].shape == (channels, 4, 4)
    assert document["input_ids"].count(IMAGE) == 4


def test_a_sample_is_a_function_of_seed_and_number_alone():
    first, again, other_seed = (documents_of(encoded_rows(), seed=seed) for seed in (3, 3, 4))
    key = SampleKey(11, 0, 2)
    for name in ("noise", "timesteps"):
        one, same, other = (torch.stack(list(dataset[key][name])) for dataset in (first, again, other_seed))
        assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(first[SampleKey(12, 0, 2)]["noise"][0], first[key]["noise"][0])


def test_the_noise_cap_holds_for_images_before_their_caption():
    arguments = DocumentArguments(image_first_share=1, noise_cap=7)
    dataset = documents_of(encoded_rows(), arguments=arguments)
    times = [float(dataset[SampleKey(number, 0, 0)]["timesteps"][0]) for number in range(50)]
    assert max(times) < 7 and len(set(times)) == 50


def test_documents_hold_several_images():
    picture = Image.new("RGB", (9, 9))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "a"}, {"type": "image", "image": picture}]
    document = documents_of([{"content": content}])[SampleKey(0, 0, 0)]
    assert len(document["images"]) == len(document["noise"]) == len(document["timesteps"]) == 2


def test_text_rows_come_from_the_second_source_and_have_no_images():
    dataset = documents_of(encoded_rows(), text_rows=[{"text": "xyz"}])
    document = dataset[SampleKey(0, 1, 0)]
    assert document["images"] == [] and document["input_ids"] == [BOS, *(6 + ord(letter) for letter in "xyz"), EOS]


def test_long_texts_give_a_stretch_of_their_tokens():
    dataset = documents_of([], text_rows=[{"text": "abcdefghijklmnop"}], max_tokens=7)
    whole = [BOS, *(6 + ord(letter) for letter in "abcdefghijklmnop"), EOS]
    starts = set()
    for number in range(60):
        ids, labels = (dataset[SampleKey(number, 1, 0)][name] for name in ("input_ids", "labels"))
        start = whole.index(ids[0])
        starts.add(start)
        assert ids == whole[start : start + 7] and labels == [-100, *ids[1:]]
    assert starts == set(range(12))


def test_a_picture_document_longer_than_a_window_is_refused_by_row():
    with pytest.raises(RowError, match="(?i)row 4.*13.*11"):
        documents_of(encoded_rows(), max_tokens=11)[SampleKey(0, 0, 4)]


def test_shares_that_a_recipe_leaves_open_are_those_of_the_paper():
    filled = documents_of(encoded_rows(), arguments=DocumentArguments()).arguments
    assert (filled.image_first_share, filled.caption_dropout) == (0.2, 0.1)
    kept = documents_of(encoded_rows(), arguments=DocumentArguments(image_first_share=0, caption_dropout=1)).arguments
    assert (kept.image_first_share, kept.caption_dropout) == (0, 1)


class CodeProcessor:
    """A stub whose letters are tokens from 500, and whose codes are tokens from 200."""

    def encode_document(self, content):
        ids = [SEP]
        for part in content:
            ids += [BREAK] if len(ids) > 1 else []
            ids += (
                [200 + code for code in part["codes"]]
                if part["type"] == "image"
                else [500 + ord(letter) for letter in part["text"]]
            )
        return {"input_ids": [*ids, SEP], "labels": [-100, *ids[1:], SEP]}


SEP, BREAK, EOSS, SENTINEL = 11, 12, 13, 14
CODES = [3, 1, 4, 1, 5, 9]


def masking_of(**fields):
    ids = {"break_token_id": BREAK, "eos_token_id": SEP, "eoss_token_id": EOSS}
    return CM3Masking(**ids, first_sentinel_token_id=SENTINEL, num_sentinel_tokens=7, **{"max_spans": 3, **fields})


def code_documents_of(rows, arguments=None, masking=None, **fields):
    return CodeDocuments(
        rows,
        processor=CodeProcessor(),
        masking=masking or masking_of(),
        arguments=arguments or DocumentArguments(),
        **{"seed": 3, **fields},
    )


def letters(text):
    return [500 + ord(letter) for letter in text]


PAIR = [SEP, *letters("kite"), BREAK, *(200 + code for code in CODES), SEP]


def test_a_document_of_codes_is_its_pair_masked_and_every_token_but_the_first_a_target():
    dataset = code_documents_of([{"codes": np.array(CODES), "text": "kite"}])
    lengths = set()
    for number in range(60):
        document = dataset[SampleKey(number, 0, 0)]
        assert document.keys() == {"input_ids", "labels"}
        assert unmask_document(document["input_ids"], masking_of()).tolist() == PAIR
        assert document["labels"].tolist() == [-100, *document["input_ids"].tolist()[1:]]
        lengths.add(len(document["input_ids"]))
    assert {len(PAIR), len(PAIR) + 3} <= lengths


def test_captions_of_codes_are_masked_and_neither_dropped_nor_behind_their_image():
    dataset = code_documents_of([{"codes": CODES, "text": "kite"}])
    documents = [tuple(dataset[SampleKey(number, 0, 0)]["input_ids"].tolist()) for number in range(2000)]
    masked = (SEP, SENTINEL, BREAK, *PAIR[6:], SENTINEL, *letters("kite"), EOSS)
    assert 0.18 < documents.count(masked) / 2000 < 0.27 and 0.33 < documents.count(tuple(PAIR)) / 2000 < 0.41
    first = code_documents_of([{"codes": CODES, "text": "kite"}], DocumentArguments(image_first_share=1))
    document = unmask_document(first[SampleKey(0, 0, 0)]["input_ids"], masking_of()).tolist()
    assert document == [SEP, *PAIR[6:-1], BREAK, *letters("kite"), SEP]


def test_causal_documents_stay_as_they_are_some_without_caption_and_some_with_the_image_first():
    rows = [{"codes": CODES, "text": "kite"}]
    dataset = CodeDocuments(rows, processor=CodeProcessor(), masking=None, arguments=DocumentArguments(), seed=3)
    documents = [dataset[SampleKey(number, 0, 0)] for number in range(2000)]
    assert all(one["labels"].tolist() == [-100, *one["input_ids"].tolist()[1:]] for one in documents)
    kinds = [tuple(one["input_ids"].tolist()) for one in documents]
    image_first = (SEP, *PAIR[6:-1], BREAK, *letters("kite"), SEP)
    shares = {kind: kinds.count(kind) / 2000 for kind in set(kinds)}
    expected = {tuple(PAIR): 0.72, image_first: 0.2, (SEP, *PAIR[6:]): 0.08}
    assert shares == {kind: pytest.approx(share, abs=0.04) for kind, share in expected.items()}


def test_causal_documents_need_no_room_for_spans():
    rows = [{"codes": CODES, "text": "kite"}]
    fields = {"processor": CodeProcessor(), "masking": None, "seed": 3, "arguments": DocumentArguments()}
    assert len(CodeDocuments(rows, max_tokens=len(PAIR), **fields)[SampleKey(0, 0, 0)]["input_ids"]) <= len(PAIR)
    with pytest.raises(RowError, match="Row 0: its document has 13 tokens, more than the 12"):
        CodeDocuments(rows, max_tokens=len(PAIR) - 1, **fields)[SampleKey(0, 0, 0)]
    texts = CodeDocuments([], text_rows=[{"text": "abcdefghijkl"}], max_tokens=5, **fields)
    stretch = texts[SampleKey(4, 1, 0)]
    assert len(stretch["input_ids"]) == 5 and stretch["labels"].tolist() == [-100, *stretch["input_ids"].tolist()[1:]]


def test_a_sample_of_codes_is_a_function_of_seed_and_number_alone():
    rows = Dataset.from_list([{"codes": CODES, "text": "kite"}] * 2)
    keys = [SampleKey(number, 0, number % 2) for number in range(40)]
    alone, together, other = (code_documents_of(rows, seed=seed) for seed in (3, 3, 4))
    one = [alone[key]["input_ids"].tolist() for key in keys]
    assert one == [document["input_ids"].tolist() for document in together.__getitems__(keys)]
    assert one != [document["input_ids"].tolist() for document in other.__getitems__(keys)]


def test_documents_have_codes_in_their_parts():
    content = [{"type": "text", "text": "a"}, {"type": "image", "codes": CODES}, {"type": "text", "text": "bc"}]
    document = code_documents_of([{"content": content}])[SampleKey(0, 0, 0)]
    assert unmask_document(document["input_ids"], masking_of()).tolist() == [
        *(SEP, *letters("a"), BREAK, *(200 + code for code in CODES), BREAK, *letters("bc"), SEP)
    ]


def test_long_texts_give_a_stretch_with_room_for_its_spans():
    dataset = code_documents_of([], text_rows=[{"text": "abcdefghijklmnopqrstuvw"}], max_tokens=13)
    whole, starts = [SEP, *letters("abcdefghijklmnopqrstuvw")], set()
    for number in range(200):
        ids = dataset[SampleKey(number, 1, 0)]["input_ids"]
        kept = unmask_document(ids, masking_of()).tolist()
        start = whole.index(kept[0])
        assert len(ids) <= 13 and kept in (whole[start:][: len(kept)], [*whole[start:], SEP])
        starts.add(start)
    assert starts == set(range(25 - 13 + 1))


@pytest.mark.parametrize(("max_tokens", "fits"), [(len(PAIR) + 9, True), (len(PAIR) + 8, False)])
def test_room_for_spans_is_reserved_and_a_pair_without_it_refused_by_row(max_tokens, fits):
    dataset = code_documents_of([{"codes": CODES, "text": "kite"}], max_tokens=max_tokens)
    if fits:
        longest = max(len(dataset[SampleKey(number, 0, 0)]["input_ids"]) for number in range(300))
        assert len(PAIR) < longest <= max_tokens
    else:
        with pytest.raises(RowError, match="Row 0: its document has 13 tokens and 9 more for masked spans.*the 21"):
            dataset[SampleKey(0, 0, 0)]


@pytest.mark.parametrize("row", [{"image": "picture", "text": "a"}, {"content": [{"type": "image", "image": "p"}]}])
def test_images_without_codes_are_refused_with_the_way_to_make_them(row):
    with pytest.raises(RowError, match="Row 0: its image has no `codes`.*recipes/encode_images.py"):
        code_documents_of([row])[SampleKey(0, 0, 0)]


def test_what_belongs_to_noised_images_is_refused():
    with pytest.raises(ValueError, match="`noise_cap`=500: codes are not noised"):
        code_documents_of([], DocumentArguments(noise_cap=500))
    with pytest.raises(ValueError, match="`caption_dropout`=0.1: documents with codes have masked captions instead"):
        code_documents_of([], DocumentArguments(caption_dropout=0.1))


def test_of_several_drawn_answers_one_is_denoised_each_equally_often():
    generator = torch.Generator().manual_seed(0)
    assert see_all_but_one([False, True], generator) == [True, False]
    assert see_all_but_one([False], generator) == [True] and see_all_but_one([], generator) == []
    draws = [tuple(see_all_but_one([False, True, False, True, True], generator)) for _ in range(600)]
    counts = {draw: draws.count(draw) for draw in set(draws)}
    assert set(counts) == {tuple(number != noised for number in range(5)) for noised in (1, 3, 4)}
    assert min(counts.values()) > 150
