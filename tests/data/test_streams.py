import json

import pytest
from datasets import Dataset

from hf_mm.data.streams import ShuffledStream, StreamedBatches


def make_stream(num_rows: int = 23, num_shards: int = 5, **fields) -> ShuffledStream:
    rows = Dataset.from_dict({"row": list(range(num_rows))}).to_iterable_dataset(num_shards=num_shards)
    return ShuffledStream(rows, **{"seed": 3, "block_size": 4, **fields})


def take(stream: ShuffledStream, number: int) -> list[tuple[int, int]]:
    return [(key.number, row["row"]) for (key, row), _ in zip(stream, range(number), strict=False)]


@pytest.mark.parametrize("num_shards", [5, 4, 1])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_row_comes_once_an_epoch_over_all_processes(num_processes, num_shards):
    streams = [
        make_stream(24, num_shards, process_index=index, num_processes=num_processes) for index in range(num_processes)
    ]
    per_process = 24 // num_processes
    taken = [take(stream, 2 * per_process) for stream in streams]
    for epoch in range(2):
        rows = [row for part in taken for _, row in part[epoch * per_process : (epoch + 1) * per_process]]
        assert sorted(rows) == list(range(24))
    assert sorted(number for part in taken for number, _ in part) == list(range(48))
    assert [row for _, row in taken[0][:per_process]] != [row for _, row in taken[0][per_process:]]  # another order


@pytest.mark.parametrize("num_taken", [0, 1, 3, 4, 5, 22, 23, 24, 31, 46, 60])
def test_a_stream_goes_on_at_the_exact_next_row(num_taken):
    whole = take(make_stream(), 80)
    first = make_stream()
    reader = iter(first)
    begin = [next(reader) for _ in range(num_taken)]
    state = json.loads(json.dumps(first.state_dict()))
    second = make_stream()
    second.load_state_dict(state)
    assert [(key.number, row["row"]) for key, row in begin] + take(second, 80 - num_taken) == whole


def test_a_block_of_one_keeps_the_order_and_larger_ones_do_not():
    assert [row for _, row in take(make_stream(block_size=1), 23)] == list(range(23))
    shuffled = [row for _, row in take(make_stream(block_size=23), 23)]
    assert shuffled != sorted(shuffled) == list(range(23))
    assert shuffled != [row for _, row in take(make_stream(block_size=23, seed=4), 23)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_know_the_place_behind_the_last_one_that_came(num_workers):
    def make() -> StreamedBatches:
        return StreamedBatches(make_stream(), lambda row, key: {**row, "n": key.number}, list, 3, num_workers)

    whole = make()
    wanted = [next(whole) for _ in range(12)]
    first = make()
    begin = [next(first) for _ in range(5)]
    second = make()
    second.load_state_dict(first.state_dict())
    assert begin + [next(second) for _ in range(7)] == wanted


def test_what_a_stream_cannot_do_is_refused():
    with pytest.raises(ValueError, match="`block_size`=0 must be at least 1"):
        make_stream(block_size=0)
    with pytest.raises(ValueError, match="`dataloader_num_workers`=2: a stream is read by 0 or 1"):
        StreamedBatches(make_stream(), dict, list, 3, 2)
    with pytest.raises(ValueError, match="shared by 1 processes and is now by 2"):
        make_stream(num_processes=2).load_state_dict(make_stream().state_dict())
    with pytest.raises(ValueError, match="Process 1 of 2 has no rows"):
        take(make_stream(1, 1, process_index=1, num_processes=2), 1)
