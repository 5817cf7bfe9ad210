import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from hf_mm.data.collators import TrainingDocuments, build_collator, collate_documents, stack_images
from hf_mm.data.formats import RowError
from hf_mm.data.mixing import DocumentArguments, SampleKey


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
    return TrainingDocuments(
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


def keyed(dataset, count=5):
    return [dataset[SampleKey(number, 0, number)] for number in range(count)]


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


def test_documents_without_windows_are_rows_of_their_own_padded_on_the_right():
    documents = keyed(documents_of(encoded_rows()))
    batch = collate_documents(documents, pad_token_id=PAD)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "latents", "noise", "timesteps"}
    assert batch["input_ids"].shape == (5, 13)
    for row, document in enumerate(documents):
        length = len(document["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == document["input_ids"]
        assert batch["labels"][row, :length].tolist() == document["labels"]
        assert (batch["input_ids"][row, length:] == PAD).all() and (batch["labels"][row, length:] == -100).all()
        assert batch["position_ids"][row].tolist() == [*range(length), *range(13 - length)]
        assert torch.equal(batch["latents"][row], document["images"][0])


def test_windows_hold_every_document_once_with_its_images_in_reading_order():
    documents = keyed(documents_of(encoded_rows()))
    batch = collate_documents(documents, pad_token_id=PAD, window_length=23)
    starts = [
        (row, place)
        for row in range(len(batch["input_ids"]))
        for place in range(23)
        if batch["position_ids"][row, place] == 0 and batch["input_ids"][row, place] == BOS
    ]
    assert len(starts) == 5 and len(batch["latents"]) == 5
    found = []
    for image, (row, place) in enumerate(starts):
        (match,) = [
            index
            for index, document in enumerate(documents)
            if batch["input_ids"][row, place : place + len(document["input_ids"])].tolist() == document["input_ids"]
        ]
        found.append(match)
        for name, key in (("latents", "images"), ("noise", "noise"), ("timesteps", "timesteps")):
            assert torch.equal(batch[name][image], documents[match][key][0])
    assert sorted(found) == list(range(5))


def test_positions_restart_with_each_document_and_with_the_padding():
    batch = collate_documents(keyed(documents_of(encoded_rows())), pad_token_id=PAD, window_length=23)
    for row in range(len(batch["input_ids"])):
        for place in range(1, 23):
            expected = 0 if batch["input_ids"][row, place] == BOS else int(batch["position_ids"][row, place - 1]) + 1
            is_first_pad = batch["input_ids"][row, place] == PAD and batch["input_ids"][row, place - 1] != PAD
            assert int(batch["position_ids"][row, place]) == (0 if is_first_pad else expected)


def test_images_of_different_sizes_are_padded_and_their_sizes_told():
    rows = [{"pixels": pixels(0, 4, 8), "text": "a"}, {"pixels": pixels(1, 6, 4), "text": "b"}]
    documents = keyed(documents_of(rows), 2)
    batch = collate_documents(documents, pad_token_id=PAD)
    assert batch["image_sizes"].tolist() == [[4, 8], [6, 4]]
    assert batch["latents"].shape == batch["noise"].shape == (2, 3, 6, 8)
    assert torch.equal(batch["latents"][1, :, :6, :4], documents[1]["images"][0])
    assert not batch["latents"][1, :, :, 4:].any() and not batch["latents"][0, :, 4:].any()


def test_a_batch_of_text_has_no_image_entries():
    dataset = documents_of([], text_rows=[{"text": "abc"}, {"text": "de"}])
    batch = collate_documents([dataset[SampleKey(row, 1, row)] for row in range(2)], pad_token_id=PAD)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}


def test_a_document_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="window_length.*11"):
        collate_documents(keyed(documents_of(encoded_rows())), pad_token_id=PAD, window_length=11)


def test_unencoded_pictures_go_by_their_own_name():
    batch = collate_documents(keyed(documents_of(encoded_rows()), 2), pad_token_id=PAD, image_key="pixel_values")
    assert "pixel_values" in batch and "latents" not in batch


def test_images_alike_have_no_sizes():
    images = [torch.ones(3, 4, 6), torch.zeros(3, 4, 6)]
    stacked, sizes = stack_images(images)
    assert stacked.shape == (2, 3, 4, 6) and sizes is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(num_workers):
    dataset = documents_of(Dataset.from_list(encoded_rows()))
    batches = [[SampleKey(2 * step + row, 0, (2 * step + row) % 5) for row in range(2)] for step in range(3)]
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=build_collator(PAD, 29, "latents"), num_workers=num_workers
    )
    expected = [
        collate_documents([dataset[key] for key in keys], pad_token_id=PAD, window_length=29) for keys in batches
    ]
    for batch, wanted in zip(loader, expected, strict=True):
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_the_collator_can_be_sent_to_workers():
    collate = pickle.loads(pickle.dumps(build_collator(PAD, 29, "latents")))
    assert collate(keyed(documents_of(encoded_rows())))["input_ids"].shape[1] == 29
