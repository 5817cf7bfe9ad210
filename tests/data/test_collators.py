import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_mm.data.collators import build_collator, collate_documents, stack_images


PAD, BOS, EOS, BOI, EOI, IMAGE = range(6)


def picture(seed, height=4, width=4):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def document_of(length, *images):
    """Letters, then images of four places each."""
    ids = [BOS, *range(10, 10 + length)]
    labels = [-100, *ids[1:]]
    for _ in images:
        ids, labels = [*ids, BOI, *[IMAGE] * 4, EOI], [*labels, BOI, *[-100] * 5]
    return {
        "input_ids": [*ids, EOS],
        "labels": [*labels, EOS],
        "images": list(images),
        "noise": [torch.randn(image.shape) for image in images],
        "timesteps": torch.rand(len(images)),
    }


def make_documents(count=5):
    return [document_of(seed + 1, picture(seed)) for seed in range(count)]


def code_document_of(length):
    ids = np.arange(10, 10 + length)
    ids[0] = BOS
    return {"input_ids": ids, "labels": np.concatenate([[-100], ids[1:]])}


def test_documents_without_windows_are_rows_of_their_own_padded_on_the_right():
    documents = make_documents()
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
    documents = make_documents()
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
    batch = collate_documents(make_documents(), pad_token_id=PAD, window_length=23)
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        starts = [place for place in range(23) if ids[place] == BOS or (ids[place] == PAD and ids[place - 1] != PAD)]
        for start, stop in itertools.pairwise([*starts, 23]):
            assert positions[start:stop] == [place % 13 for place in range(stop - start)]  # 13: the longest


def test_images_of_different_sizes_are_padded_and_their_sizes_told():
    documents = [document_of(1, picture(0, 4, 8)), document_of(1, picture(1, 6, 4))]
    batch = collate_documents(documents, pad_token_id=PAD)
    assert batch["image_sizes"].tolist() == [[4, 8], [6, 4]]
    assert batch["latents"].shape == batch["noise"].shape == (2, 3, 6, 8)
    assert torch.equal(batch["latents"][1, :, :6, :4], documents[1]["images"][0])
    assert not batch["latents"][1, :, :, 4:].any() and not batch["latents"][0, :, 4:].any()


def test_a_batch_of_text_has_no_image_entries():
    batch = collate_documents([document_of(3), document_of(2)], pad_token_id=PAD)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}


def test_a_document_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="window_length.*11"):
        collate_documents(make_documents(), pad_token_id=PAD, window_length=11)


def test_unencoded_pictures_go_by_their_own_name():
    batch = collate_documents(make_documents(2), pad_token_id=PAD, image_key="pixel_values")
    assert "pixel_values" in batch and "latents" not in batch


def test_images_alike_have_no_sizes():
    images = [torch.ones(3, 4, 6), torch.zeros(3, 4, 6)]
    stacked, sizes = stack_images(images)
    assert stacked.shape == (2, 3, 4, 6) and sizes is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(num_workers):
    dataset = make_documents()
    batches = [[(2 * step + row) % 5 for row in range(2)] for step in range(3)]
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
    assert collate(make_documents())["input_ids"].shape[1] == 29


def test_documents_of_codes_are_packed_whole_and_have_nothing_beside_their_tokens():
    lengths = [13, 7, 19, 5, 11]
    batch = collate_documents([code_document_of(n) for n in lengths], pad_token_id=PAD, window_length=29)
    assert batch.keys() == {"input_ids", "labels", "position_ids"} and batch["input_ids"].shape == (2, 29)
    found = []
    for ids, labels, positions in zip(*(batch[name].tolist() for name in batch), strict=True):
        edges = [*(place for place in range(29) if positions[place] == 0), 29]
        for start, stop in itertools.pairwise(edges):
            if ids[start] == BOS:
                found.append(stop - start)
                assert ids[start + 1 : stop] == labels[start + 1 : stop] == [*range(11, 10 + stop - start)]
                assert labels[start] == -100 and positions[start:stop] == [*range(stop - start)]
            else:
                assert set(ids[start:stop]) == {PAD} and set(labels[start:stop]) == {-100}
    assert sorted(found) == sorted(lengths)


def test_padding_is_cut_into_documents_no_longer_than_the_longest():
    batch = collate_documents([code_document_of(5), code_document_of(3)], pad_token_id=PAD, window_length=17)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
