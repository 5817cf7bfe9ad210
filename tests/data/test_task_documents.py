"""Documents of tasks: what is asked comes first or last, answers are marked, masked and trained on as asked for."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_mm.cm3leon import CM3LeonProcessor
from hf_mm.data.cm3_masking import CM3Masking, mask_answer, unmask_document
from hf_mm.data.collators import collate_documents
from hf_mm.data.mixing import DocumentArguments, SampleKey
from hf_mm.data.task_documents import TaskArguments, TaskContent, TaskRows, TaskSourceRows
from hf_mm.data.task_templates import TASKS
from hf_mm.data.training_documents import CodeDocuments, NoisedDocuments


NUM_CODES_PER_IMAGE = 16


def code_source(task: str, count: int = 5, name: str | None = None, **texts: list[str]) -> TaskSourceRows:
    """Rows whose pictures are codes: picture `n` of all has the code `n` everywhere."""
    slots = TASKS[task].image_slots
    pictures = Dataset.from_dict(
        {"codes": [[place] * NUM_CODES_PER_IMAGE for place in range(count * len(slots))]}
    ).with_format("numpy")
    places = {slot: np.arange(count) + number * count for number, slot in enumerate(slots)}
    return TaskSourceRows(name or task, Dataset.from_dict(texts), pictures, places, TASKS[task])


def edits(**fields: object) -> TaskSourceRows:
    return code_source("edit", instruction=[f"make it {word}" for word in ("a", "b", "c", "d", "e")], **fields)


def questions() -> TaskSourceRows:
    return code_source("vqa", question=["what"] * 5, answer=["star", "kite", "moon", "key", "bolt"])


@pytest.fixture
def processor(make_cm3leon_config, make_cm3leon_processor) -> CM3LeonProcessor:
    return make_cm3leon_processor(make_cm3leon_config())


@pytest.fixture
def masking(make_cm3leon_config) -> CM3Masking:
    config = make_cm3leon_config()
    names = ("break_token_id", "eos_token_id", "eoss_token_id", "first_sentinel_token_id", "num_sentinel_tokens")
    return CM3Masking(mean_spans=1.0, max_spans=3, **{name: getattr(config, name) for name in names})


def documents_of(source: TaskSourceRows, processor, masking, seed: int = 0, **fields: object) -> CodeDocuments:
    arguments = TaskArguments(**{"answer_masking_share": 1.0, "instruction_dropout": 0.0, **fields})
    return CodeDocuments(
        TaskRows([source]),
        processor=processor,
        masking=masking,
        arguments=DocumentArguments(),
        seed=seed,
        task_content=TaskContent(arguments, puts_answer_last=False),
    )


def test_rows_of_all_sources_have_one_numbering_and_their_own_pictures():
    rows = TaskRows([edits(), questions()])
    assert len(rows) == 10
    third, seventh = rows[2], rows[6]
    assert third["instruction"] == "make it c" and seventh["answer"] == "kite"
    assert set(third["input_image"]["codes"]) == {2} and set(third["image"]["codes"]) == {7}
    assert set(seventh["image"]["codes"]) == {1}


def test_weights_give_each_source_its_share():
    rows = TaskRows([edits(), code_source("vqa", count=2, question=["a"] * 2, answer=["b"] * 2)])
    weights = rows.weights({"edit": 0.25, "vqa": 0.75})
    assert weights.shape == (7,) and weights[:5].sum() == pytest.approx(0.25) and weights[5:].sum() == 0.75


def test_a_written_answer_is_masked_whole_so_that_training_has_the_form_of_the_prompt(processor, masking):
    documents = documents_of(questions(), processor, masking)
    seen = set()
    for number in range(12):
        ids = documents[SampleKey(number, 0, 1)]["input_ids"]
        whole = processor.tokenizer.decode(unmask_document(ids, masking))
        seen.add(whole.split("kite")[0])
        tail = ids.tolist().index(masking.eos_token_id, 1)
        assert processor.tokenizer.decode(ids[tail + 2 : -1]).strip() == "kite"
        asked = whole.split("kite")[0].removesuffix(" ").removeprefix(processor.tokenizer.eos_token)
        after = whole.split("kite")[1].split("<break>")[0]
        content = [{"type": "text", "text": asked}, {"type": "mask"}]
        content += [{"type": "text", "text": after}] if after else []
        prompt = processor.infill_prompt([*content, {"type": "image", "codes": [1] * NUM_CODES_PER_IMAGE}])
        assert ids[: tail + 2].tolist() == prompt["input_ids"]
    assert len(seen) == len(TASKS["vqa"].templates)


def test_causal_documents_begin_with_the_prompt_of_captioning_and_end_with_the_answer(
    make_cm3leon_config, make_cm3leon_processor
):
    processor = make_cm3leon_processor(make_cm3leon_config(objective="causal"))
    arguments = TaskArguments(train_on_inputs=False)
    documents = CodeDocuments(
        TaskRows([questions()]),
        processor=processor,
        masking=None,
        arguments=DocumentArguments(),
        seed=0,
        task_content=TaskContent(arguments, puts_answer_last=True),
    )
    for number in range(12):
        document = documents[SampleKey(number, 0, 1)]
        ids, is_target = document["input_ids"], document["labels"] != -100
        codes, asked = [1] * NUM_CODES_PER_IMAGE, processor.split_document(ids[~is_target])[1]["text"]
        assert processor.caption_prompt(asked, codes) == ids[~is_target].tolist()
        assert processor.tokenizer.decode(ids[is_target][:-1]).strip() == "kite"
        assert ids[-1] == processor.tokenizer.eos_token_id and is_target[-1]


def test_a_drawn_answer_stands_last_and_nothing_is_masked(processor, masking):
    ids = documents_of(edits(), processor, masking)[SampleKey(0, 0, 3)]["input_ids"]
    parts = processor.split_document(ids)
    assert [part["type"] for part in parts] == ["text", "image", "text", "image"]
    assert "make it d" in parts[2]["text"] and set(parts[3]["codes"]) == {8}


def test_without_the_inputs_only_answers_are_targets(processor, masking):
    for source, row in ((edits(), 3), (questions(), 1)):
        document = documents_of(source, processor, masking, train_on_inputs=False)[SampleKey(0, 0, row)]
        targets = document["labels"][document["labels"] != -100]
        whole = documents_of(source, processor, masking)[SampleKey(0, 0, row)]["labels"]
        assert (whole[1:] != -100).all() and len(targets) < len(whole) / 2
        if source.name == "edit":
            first_code = processor.first_image_token_id
            assert Counter(targets.tolist())[first_code + 8] == NUM_CODES_PER_IMAGE
            assert set(targets.tolist()) <= {first_code + 8, masking.eos_token_id}
        else:
            assert processor.tokenizer.decode(targets[:-1]).strip() == "kite" and targets[-1] == masking.eoss_token_id


def test_a_share_of_documents_is_masked_at_random(processor, masking):
    documents = documents_of(questions(), processor, masking, answer_masking_share=0.5)
    last = [processor.tokenizer.decode(documents[SampleKey(number, 0, 1)]["input_ids"]) for number in range(200)]
    whole_answer = np.mean([text.endswith("kite<eoss>") and text.count("<eoss>") == 1 for text in last])
    assert 0.45 < whole_answer < 0.75


def test_dropped_instructions_leave_the_picture_alone_to_follow(processor, masking):
    documents = documents_of(edits(), processor, masking, instruction_dropout=0.5)
    lengths = Counter(
        len(processor.split_document(documents[SampleKey(number, 0, 0)]["input_ids"])) for number in range(200)
    )
    assert set(lengths) == {3, 4} and 70 < lengths[3] < 130
    answered = documents_of(questions(), processor, masking, instruction_dropout=1.0)[SampleKey(0, 0, 0)]
    assert "what" in processor.tokenizer.decode(answered["input_ids"])  # nothing is drawn, so nothing is guided


def test_causal_models_read_what_is_asked_before_they_answer():
    content = TaskContent(TaskArguments(instruction_dropout=0.0), puts_answer_last=True)
    parts = content(TaskRows([questions()])[2], torch.Generator().manual_seed(0))
    assert [part["type"] for part in parts] == ["image", "text", "text"]
    assert [part["is_answer"] for part in parts] == [False, False, True] and parts[2]["text"] == "moon"


def test_conversations_keep_their_turns_and_pictures():
    messages = [
        {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "bluer"}]},
        {"role": "assistant", "content": [{"type": "image", "image": None}]},
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "a star"},
    ]
    pictures = Dataset.from_dict({"codes": [[number] * 4 for number in range(5)]})
    rows = Dataset.from_list([{"number": 0}, {"number": 1}])
    source = TaskSourceRows("chat", rows, pictures, {"messages": np.array([0, 3])})
    source.rows = [{"messages": messages}] * 2  # of mixed content, which Arrow would make alike
    parts = TaskContent(TaskArguments(), puts_answer_last=True)(source.read(1), torch.Generator())
    kinds = [(part["type"], part.get("is_answer")) for part in parts]
    assert [kind for kind in kinds if kind[0] != "end_of_turn"] == [
        ("image", False), ("text", False), ("image", True), ("text", False), ("text", True),
    ]  # fmt: skip
    assert [part["codes"] for part in parts if part["type"] == "image"] == [[3] * 4, [4] * 4]
    assert kinds.count(("end_of_turn", None)) == 1


class PartsProcessor:
    """Encodes nothing and keeps what the last document consisted of."""

    def encode_document(self, content):
        self.kinds = [part["type"] for part in content]
        return {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "answer_mask": [0, 0, 1]}


def noised_documents_of(source: TaskSourceRows) -> NoisedDocuments:
    return NoisedDocuments(
        TaskRows([source]),
        processor=PartsProcessor(),
        image_size=4,
        latent_shape=(3, 4, 4),
        sample_timesteps=lambda count, **_: torch.full((count,), 5.0),
        arguments=DocumentArguments(),
        seed=0,
        task_content=TaskContent(TaskArguments(train_on_inputs=False, instruction_dropout=0.0), puts_answer_last=True),
    )


def pixels_of(count: int) -> Dataset:
    pixels = np.arange(count * 3 * 4 * 4, dtype=np.uint8).reshape(count, 3, 4, 4)
    return Dataset.from_dict({"pixels": pixels}).with_format("numpy")


def test_pictures_that_are_asked_about_are_clean_and_those_that_answer_are_not():
    places = {"input_image": np.array([0]), "image": np.array([1])}
    source = TaskSourceRows("edit", Dataset.from_dict({"instruction": ["x"]}), pixels_of(2), places, TASKS["edit"])
    documents = noised_documents_of(source)
    document = documents[SampleKey(0, 0, 0)]
    assert documents.processor.kinds == ["text", "image", "text", "image"]
    assert document["clean_images"] == [True, False] and document["labels"].tolist() == [-100, -100, 3]
    batch = collate_documents([document, document], pad_token_id=0)
    assert batch["clean_images"].tolist() == [True, False] * 2 and batch["latents"].shape == (4, 3, 4, 4)


def test_of_several_drawn_answers_of_a_conversation_one_at_a_time_is_denoised():
    given, drawn = ({"type": "image", "image": None, "text": None} for _ in range(2))
    word = {"type": "text", "image": None, "text": "bluer"}
    messages = [
        {"role": "user", "content": [given, word]},
        {"role": "assistant", "content": [drawn]},
        {"role": "user", "content": [word]},
        {"role": "assistant", "content": [drawn]},
    ]
    rows = Dataset.from_list([{"messages": messages}])
    documents = noised_documents_of(TaskSourceRows("chat", rows, pixels_of(3), {"messages": np.array([0])}))
    seen = Counter(tuple(documents[SampleKey(number, 0, 0)]["clean_images"]) for number in range(40))
    assert set(seen) == {(True, False, True), (True, True, False)} and min(seen.values()) > 8


def test_masking_answers_keeps_every_token_and_marks_what_answers(masking):
    eos, end = masking.eos_token_id, masking.break_token_id
    ids = np.array([eos, 50, 51, 52, end, 53, 54, end, 55, eos])
    is_answer = np.array([0, 0, 1, 1, 1, 1, 0, 0, 1, 0], dtype=bool)
    masked, marks = mask_answer(ids, is_answer, masking)
    assert (unmask_document(masked, masking) == ids).all()
    assert masked[marks].tolist() == [
        51,
        52,
        masking.eoss_token_id,
        53,
        masking.eoss_token_id,
        55,
        masking.eoss_token_id,
    ]
    with pytest.raises(ValueError, match=r"has \d+ answers"):
        mask_answer(np.array([eos, *[50, end] * 9, eos]), np.ones(20, dtype=bool), masking)


def test_shares_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`instruction_dropout`=1.5"):
        TaskArguments(instruction_dropout=1.5)
    with pytest.raises(ValueError, match="`sources` is empty"):
        TaskRows([])
