from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_mm.data.cm3_masking import CM3Masking, unmask_document
from hf_mm.data.formats import RowError
from hf_mm.data.mixing import DocumentArguments, SampleKey, StepSampler
from hf_mm.data.retrieved_documents import MemoryBank, RetrievalArguments, RetrievedPairs
from hf_mm.data.training_documents import CodeDocuments


SEP, BREAK, EOSS, SENTINEL = 11, 12, 13, 14
MASKING = CM3Masking(break_token_id=BREAK, eos_token_id=SEP, eoss_token_id=EOSS, first_sentinel_token_id=SENTINEL,
                     num_sentinel_tokens=7, max_spans=5)  # fmt: skip
CAPTIONS = ["kite", "a", "boat", "star", "hi", "moon", "ring"]
NEIGHBORS = [[3, 5, 1], [2, 0, 4], [6, 1], [], [0, 1, 2], [4, 6, 0], [5, 2, 3]]  # best first
NUM_CODES = 6
NUM_SAMPLES = 700


class CodeProcessor:
    """A stub whose letters are tokens from 500, and whose codes are tokens from 200."""

    def encode_document(self, content):
        ids = [SEP]
        for part in content:
            ids += [BREAK] if len(ids) > 1 else []
            ids += [200 + code for code in part["codes"]] if part["type"] == "image" else letters(part["text"])
        return {"input_ids": [*ids, SEP], "labels": [-100, *ids[1:], SEP]}


def letters(text):
    return [500 + ord(letter) for letter in text]


def codes_of(number):
    return [(7 * number + place) % 100 for place in range(NUM_CODES)]


def make_rows(**columns):
    """Rows that are told by their captions and by their codes."""
    rows = {"codes": [codes_of(number) for number in range(len(CAPTIONS))], "description": CAPTIONS}
    return Dataset.from_dict({**rows, "neighbor_ids": NEIGHBORS, "row_number": list(range(len(CAPTIONS))), **columns})


def documents_of(rows=None, memory=None, counts=(0, 1, 2), query_caption_dropout=0.0, **fields):
    rows = make_rows() if rows is None else rows
    memory = MemoryBank(rows) if memory is None else memory
    retrieval = RetrievedPairs(memory, counts=counts, query_caption_dropout=query_caption_dropout)
    fields = {"arguments": DocumentArguments(), "masking": MASKING, "seed": 3, **fields}
    return CodeDocuments(rows, processor=CodeProcessor(), retrieval=retrieval, **fields)


def draw(documents, row, num_samples=NUM_SAMPLES):
    return [documents[SampleKey(number, 0, row)] for number in range(num_samples)]


def read(document):
    """The document's parts, each the number of the row it is of, and its kind."""
    ids = unmask_document(document["input_ids"], MASKING).tolist()
    assert ids[0] == ids[-1] == SEP and SEP not in ids[1:-1]
    parts = [list(part) for is_break, part in groupby(ids[1:-1], lambda token: token == BREAK) if not is_break]
    assert len(parts) - 1 == ids.count(BREAK)
    known = {tuple(letters(caption)): (number, "text") for number, caption in enumerate(CAPTIONS)}
    known |= {tuple(200 + code for code in codes_of(number)): (number, "image") for number in range(len(CAPTIONS))}
    return [known[tuple(part)] for part in parts]


@pytest.mark.parametrize("row", range(len(CAPTIONS)))
def test_retrieved_pairs_stand_whole_in_front_and_the_rows_own_is_last(row):
    for document in draw(documents_of(), row, 60):
        parts = read(document)
        numbers = [number for number, _ in parts[::2]]
        assert parts == [(number, kind) for number in numbers for kind in ("text", "image")]
        assert numbers[-1] == row and row not in numbers[:-1] and len(set(numbers)) == len(numbers)
        assert set(numbers[:-1]) <= set(NEIGHBORS[row])
        assert document["num_retrieved"] == len(numbers) - 1 and document["num_left_out"] == 0


def test_every_token_but_the_first_is_a_target():
    for document in draw(documents_of(), 0, 60):
        assert document["labels"].tolist() == [-100, *document["input_ids"].tolist()[1:]]


def test_each_count_is_as_likely_as_it_is_listed_and_each_neighbour_and_order_as_another():
    drawn = [tuple(number for number, _ in read(document)[:-2:2]) for document in draw(documents_of(), 0)]
    share = {count: number / NUM_SAMPLES for count, number in Counter(map(len, drawn)).items()}
    assert share.keys() == {0, 1, 2} and max(abs(value - 1 / 3) for value in share.values()) < 0.05
    pairs = Counter(numbers for numbers in drawn if len(numbers) == 2)
    assert len(pairs) == 6 and max(pairs.values()) < 1.6 * min(pairs.values())
    weighted = Counter(document["num_retrieved"] for document in draw(documents_of(counts=(0, 1, 1, 1)), 0))
    assert abs(weighted[1] / NUM_SAMPLES - 0.75) < 0.05


def test_a_row_with_fewer_neighbours_than_wanted_has_them_all():
    documents = documents_of(counts=[3])
    assert {document["num_retrieved"] for document in draw(documents, 2, 30)} == {2}
    assert {document["num_retrieved"] for document in draw(documents, 3, 30)} == {0}


def test_a_row_never_finds_itself_and_nothing_that_was_left_out_of_the_memory():
    rows = make_rows(neighbor_ids=[[number, *pool, (number + 1) % 7] for number, pool in enumerate(NEIGHBORS)])
    kept = rows.select([6, 2, 0, 3])
    documents = documents_of(rows, MemoryBank.of_numbered(kept, len(rows)), counts=[5])
    for row in range(len(CAPTIONS)):
        wanted = set(rows[row]["neighbor_ids"]) & {6, 2, 0, 3} - {row}
        for document in draw(documents, row, 30):
            assert {number for number, _ in read(document)[:-2]} == wanted


def test_own_captions_behind_retrieved_pairs_are_left_out_at_their_rate_and_no_others():
    dropped = {0: 0, 1: 0, 2: 0}
    documents = draw(documents_of(query_caption_dropout=0.3), 0)
    for document in documents:
        parts, count = read(document), document["num_retrieved"]
        assert parts[-1] == (0, "image") and len(parts) in (2 * count + 1, 2 * count + 2)
        dropped[count] += len(parts) == 2 * count + 1
    counts = Counter(document["num_retrieved"] for document in documents)
    assert dropped[0] == 0
    assert all(abs(dropped[count] / counts[count] - 0.3) < 0.1 for count in (1, 2))


def test_without_a_caption_a_document_is_what_the_unconditional_stream_reads():
    documents = documents_of(counts=[1], query_caption_dropout=1.0, masking=MASKING_OFF)
    ids = draw(documents, 2, 1)[0]["input_ids"].tolist()
    found = 6 if ids[1] == letters("ring")[0] else 1
    pair = [*letters(CAPTIONS[found]), BREAK, *(200 + code for code in codes_of(found)), BREAK]
    assert ids == [SEP, *pair, *(200 + code for code in codes_of(2)), SEP]


MASKING_OFF = CM3Masking(break_token_id=BREAK, eos_token_id=SEP, eoss_token_id=EOSS, first_sentinel_token_id=SENTINEL,
                         num_sentinel_tokens=7, max_spans=5, mean_spans=0)  # fmt: skip


def test_spans_of_any_part_are_masked_and_none_crosses_a_boundary():
    masked = set()
    for document in draw(documents_of(counts=[2]), 0, 400):
        ids = document["input_ids"].tolist()
        tail = ids[len(ids) - 1 - ids[::-1].index(SEP) + 1 :]
        spans = [list(span) for is_end, span in groupby(tail, lambda token: token == EOSS) if not is_end]
        parts = read(document)
        for _, *span in spans:
            assert span and not {BREAK, SEP} & set(span)
            whole = [tuple(letters(CAPTIONS[n]) if kind == "text" else [200 + code for code in codes_of(n)])
                     for n, kind in parts]  # fmt: skip
            masked |= {place for place, part in enumerate(whole) if tuple(span) == part}
    assert masked == {0, 1, 2, 3, 4, 5}


def length_of(*numbers):
    return 1 + sum(len(CAPTIONS[number]) + NUM_CODES + 2 for number in numbers) + MASKING.max_added_tokens


@pytest.mark.parametrize(
    ("max_tokens", "fitting"),
    [(length_of(3, 5, 1, 0), {3, 5, 1}), (length_of(3, 5, 1, 0) - 1, {3, 5}), (length_of(3, 0), {3}),
     (length_of(3, 0) - 1, set()), (length_of(0), set())],
)  # fmt: skip
def test_pairs_that_do_not_fit_are_left_out_least_relevant_first_and_counted(max_tokens, fitting):
    for document in draw(documents_of(counts=[3], max_tokens=max_tokens), 0, 100):
        assert {number for number, _ in read(document)[:-2]} == fitting
        assert (document["num_retrieved"], document["num_left_out"]) == (len(fitting), 3 - len(fitting))
        assert len(document["input_ids"]) <= max_tokens


def test_a_pair_that_does_not_fit_alone_is_refused():
    with pytest.raises(RowError, match="Row 0: its document has 13 tokens and 15 more for masked spans"):
        documents_of(max_tokens=length_of(0) - 1)[SampleKey(0, 0, 0)]


def test_rows_without_neighbours_are_as_they_are_without_retrieval():
    rows = make_rows().remove_columns("neighbor_ids")
    plain = CodeDocuments(rows, processor=CodeProcessor(), masking=MASKING, arguments=DocumentArguments(), seed=3)
    for one, other in zip(draw(documents_of(rows), 0, 40), draw(plain, 0, 40), strict=True):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()


def collate(documents):
    return [document["input_ids"].tolist() for document in documents]


def batches(num_steps, num_workers=0, **fields):
    sampler = StepSampler(len(CAPTIONS), 4 // fields.get("num_processes", 1), seed=5, **fields)
    loader = DataLoader(documents_of(query_caption_dropout=0.3), batch_sampler=sampler, collate_fn=collate,
                        num_workers=num_workers, generator=torch.Generator())  # fmt: skip
    return [batch for batch, _ in zip(loader, range(num_steps), strict=False)]


def test_documents_are_the_same_for_any_workers_processes_and_first_step():
    whole = batches(6)
    assert batches(6, num_workers=2) == whole
    assert batches(4, first_step=2) == whole[2:]
    halves = [batches(6, num_processes=2, process_index=index) for index in (0, 1)]
    assert [one + other for one, other in zip(*halves, strict=True)] == whole
    assert documents_of(seed=4)[SampleKey(0, 0, 0)]["input_ids"].tolist() != whole[0][0]


@pytest.mark.parametrize("wrong", [7, -1, 10**9])
@pytest.mark.parametrize("is_numbered", [False, True])
def test_a_neighbour_outside_the_memory_is_refused_by_number(wrong, is_numbered):
    rows = make_rows(neighbor_ids=[[1, wrong]] * 7)
    memory = MemoryBank.of_numbered(rows.select([1, 2]), 7) if is_numbered else MemoryBank(rows)
    with pytest.raises(RowError, match=f"Row 4: its neighbour {wrong} is not in the memory bank, which has 7 rows"):
        documents_of(rows, memory)[SampleKey(0, 0, 4)]


def test_captions_of_retrieved_pairs_are_drawn_like_others():
    rows = make_rows(keywords=[["x", "y"]] * 7)
    documents = documents_of(rows, counts=[1], form_weights={"keywords": 1.0}, masking=MASKING_OFF)
    drawn = {tuple(document["input_ids"].tolist()[1:]).index(BREAK) for document in draw(documents, 0, 40)}
    assert drawn == {1, len("x, y")}


def test_fields_out_of_range_or_without_neighbours_are_refused():
    for counts in ([], [0], [-1, 2]):
        with pytest.raises(ValueError, match=r"`retrieved_counts`=\[.*must hold numbers of at least 0"):
            RetrievalArguments(retrieved_counts=counts)
    with pytest.raises(ValueError, match=r"`query_caption_dropout`=1.5 must be in \[0, 1\]"):
        RetrievalArguments(query_caption_dropout=1.5)
    for name in ("memory_name", "eval_neighbors_dir"):
        with pytest.raises(ValueError, match=f"`{name}`='x' needs `neighbors_dir`"):
            RetrievalArguments(**{name: "x"})


def test_numbers_are_places_where_no_row_was_dropped():
    rows = make_rows()
    assert MemoryBank.of_numbered(rows, 7).places is None
    assert MemoryBank.of_numbered(rows.select([5, 0]), 7).places.tolist() == [1, -1, -1, -1, -1, 0, -1]
    assert np.array_equal([row["row_number"] for row in MemoryBank(rows).read([6, 1])], [6, 1])


@pytest.mark.parametrize("ids", [None, 3, "01", [0, None], [0.5]])
def test_neighbours_that_are_no_numbers_are_refused(ids):
    with pytest.raises(RowError, match="Row 3, column `neighbor_ids`"):
        MemoryBank(make_rows()).find_pool({"neighbor_ids": ids}, "Row 3")
