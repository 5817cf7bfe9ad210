import io
import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_mm.data.formats import RowError
from hf_mm.data.task_boxes import convert_boxes, crop_boxes
from hf_mm.data.tasks import (
    SOURCES,
    STRUCTURE_TASKS,
    TASKS,
    Task,
    TaskSource,
    answer_last,
    check_task_row,
    conversation_parts,
    fill_template,
    fitting_templates,
    format_boxes,
    load_messages,
    load_task_rows,
    mixture_weights,
    parse_boxes,
    write_objects,
)


NAMES = {"edit", "write", "boxes", "caption", "long_caption", "dense_caption", "vqa", "reasoning", "text"}
PUBLIC = {
    "instruct_pix2pix", "magic_brush", "coco_captions", "flickr30k", "image_paragraph", "localized_narratives", "vqa_v2",
    "vizwiz", "ok_vqa", "science_qa", "coco_boxes", "objects365_boxes", "openimages_boxes",
}  # fmt: skip
WORDS = {
    "answer": "red", "caption": "a red star", "choices": "(A) red (B) blue", "context": "None.", "explanation": "It is.",
    "instruction": "make it blue", "objects": "star at location (0, 1) -> (2, 3)", "question": "Which?", "text": "abc",
}  # fmt: skip


def picture(width: int = 7, height: int = 5, color: str = "red") -> PILImage.Image:
    return PILImage.new("RGB", (width, height), color)


def encoded(image: PILImage.Image) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def words(parts: list[dict]) -> list[tuple[str, bool]]:
    return [(part["text"] if part["type"] == "text" else f"<{part['slot']}>", part["is_answer"]) for part in parts]


def saved(folder: Path, columns: dict, **features: object) -> str:
    rows = Dataset.from_dict(columns)
    for name, feature in features.items():
        rows = rows.cast_column(name, feature)
    rows.save_to_disk(str(folder / "rows"))
    return str(folder / "rows")


def test_the_table_has_every_task_and_every_named_dataset() -> None:
    assert set(TASKS) == NAMES | set(STRUCTURE_TASKS)
    assert set(SOURCES) >= PUBLIC
    for source in SOURCES.values():
        slots = {
            slot for number in range(len(TASKS[source.task].templates)) for slot in TASKS[source.task].slots(number)
        }
        assert set(source.columns) <= slots
        assert source.dataset_name and source.note


def test_every_template_of_the_paper_is_there_word_for_word() -> None:
    templates = [template for task in TASKS.values() for template in task.templates]
    for beginning in (
        "Edit first image following the instruction <break> ",
        'draw "',
        "Generate high quality image of ",
        "Make high quality image from canny edge features <break> ",
        "Make high quality image from a segmentation map <break> ",
        "Make high quality image from hed features <break> ",
        "Make high quality image from openpose features <break> ",
        "Make high quality image from depth features <break> ",
        "Make high quality image from 3D norm features <break> ",
        "Make high quality image from children's scribbles <break> ",
        "{caption} <break> ",
        "Describe the given picture. ",
        "Describe the given picture in very detail. ",
        "Describe all the objects in the given image in very detail. ",
        "Generate a long caption for the given image. ",
        "Generate a long narration of what is happening in the given image. ",
        "Question: {question} Answer: {answer}. ",
        "Question: {question}\n{answer} ",
        "Question: {question} The answer is {answer}. ",
        "Question: {question}\nContext: {context}\nOptions: {choices}\nAnswer: {answer}. ",
        "Question: {question}\nContext: {context}\nOptions: {choices}\nAnswer: Let's think step-by-step: {explanation} "
        "So the answer is {answer}. ",
    ):
        assert any(template.startswith(beginning) for template in templates), beginning


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_template_can_be_filled_and_has_one_answer(name: str) -> None:
    task = TASKS[name]
    for template in range(len(task.templates)):
        parts = fill_template(name, WORDS, template)
        assert sum(part["is_answer"] for part in parts) == 1
        assert "{" not in str([part.get("text") for part in parts])
        ordered = answer_last(parts)
        assert ordered[-1]["is_answer"]
        assert not any(part["is_answer"] for part in ordered[:-1])


def test_an_edit_is_laid_out_in_the_order_of_its_template() -> None:
    assert words(fill_template("edit", {"instruction": "make the star blue"})) == [
        ("Edit first image following the instruction", False),
        ("<input_image>", False),
        ("make the star blue", False),
        ("<image>", True),
    ]


def test_a_text_answer_splits_its_segment_and_nothing_is_lost() -> None:
    row = {"question": "What color?", "answer": "red"}
    parts = fill_template("vqa", row)
    assert words(parts) == [("Question: What color? Answer: ", False), ("red", True), (".", False), ("<image>", False)]
    assert words(answer_last(parts)) == [("<image>", False), ("Question: What color? Answer: ", False), ("red", True)]


def test_an_explanation_belongs_to_the_answer() -> None:
    parts = fill_template("reasoning", WORDS, 1)
    assert [part["text"] for part in parts if part["is_answer"]] == ["It is. So the answer is red"]
    assert parts[0]["text"].endswith("Let's think step-by-step: ")
    assert [part["text"] for part in fill_template("reasoning", WORDS, 0) if part["is_answer"]] == ["red"]


def test_a_row_without_an_explanation_fits_the_other_template_and_context_may_be_empty() -> None:
    assert fitting_templates("reasoning", WORDS) == [0, 1]
    assert fitting_templates("reasoning", {**WORDS, "explanation": " ", "context": None}) == [0]
    assert "Context: \nOptions" in fill_template("reasoning", {**WORDS, "context": None})[0]["text"]


def test_words_in_braces_are_left_alone() -> None:
    assert fill_template("text", {"text": "a {caption} <s>"})[0]["text"] == "a {caption} <s>"


def test_pictures_come_before_the_question_even_if_there_are_several() -> None:
    template = "{input_image} <break> Is {question} {answer}? <break> {image} <break> Bye"
    parts = fill_template(Task("compare", (template,), "answer"), {"question": "it", "answer": "so"})
    assert words(answer_last(parts)) == [
        ("<input_image>", False), ("<image>", False), ("Bye", False), ("Is it ", False), ("so", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{caption} <break> {picture}", "unknown slots"),
        ("{caption} <break> hello <break> {image}", "between two texts"),
        ("{caption} {image}", "needs a <break>"),
        ("<break> {image} <break> {caption}", "nothing on one side"),
        ("hello <break> {image}", "no slot for the answer"),
        ("{caption} {caption} <break> {image}", "slot twice"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Task("mine", (template,), "caption")


def test_errors_name_the_row_and_the_field() -> None:
    with pytest.raises(ValueError, match=r"`task`='vqa2' is unknown"):
        fill_template("vqa2", WORDS)
    with pytest.raises(ValueError, match=r"`template`=3"):
        fill_template("vqa", WORDS, 3)
    with pytest.raises(RowError, match=r"Row 11, column `answer`: empty"):
        fill_template("vqa", {"question": "Which?", "answer": " "}, number=11)
    with pytest.raises(RowError, match=r"Row 11, column `answer`: int, must be a string"):
        fill_template("vqa", {"question": "Which?", "answer": 3}, number=11)


def test_two_pictures_of_different_sizes_are_refused() -> None:
    row = {"instruction": "grow", "input_image": picture(7, 5), "image": picture(5, 7)}
    with pytest.raises(RowError, match=r"Row 3, column `image`: .*`input_image` 7 x 5 px, `image` 5 x 7 px"):
        check_task_row("edit", row, 3)
    with pytest.raises(RowError, match=r"Row 3, column `input_image`: .*missing"):
        check_task_row("edit", {**row, "input_image": None}, 3)
    check_task_row("edit", {**row, "image": picture(7, 5)}, 3)


# Boxes


def test_boxes_are_written_as_in_the_figure_and_read_back() -> None:
    objects = [{"label": "bottle", "box": [16, 4, 64, 32]}, {"label": "dining table", "box": [0, 0, 8, 4]}]
    text = format_boxes(objects, (32, 64))
    assert text == ("bottle at location (64, 32) -> (256, 256) and with dining table at location (0, 0) -> (32, 32)")
    assert [(item["label"], item["box"]) for item in parse_boxes(text)] == [
        ("bottle", [64, 32, 256, 256]),
        ("dining table", [0, 0, 32, 32]),
    ]


def test_boxes_of_whole_grid_steps_survive_the_round_trip_exactly() -> None:
    for left in range(0, 32, 5):
        for bottom in range(3, 33, 7):
            box = [left, 2, 32, bottom]
            (item,) = parse_boxes(format_boxes([{"label": "a", "box": box}], (32, 32)))
            assert [value / 8 for value in item["box"]] == box


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([9, 1, 3, 5], "inverted"),
        ([1, 5, 3, 5], "inverted or empty"),
        ([1, 1, 66, 5], "outside its picture of 64 x 32"),
        ([-2, 1, 6, 5], "outside"),
        ([64.2, 1, 64.8, 5], "outside"),
        ([1, 2, 3], "four numbers"),
    ],
)
def test_a_box_that_is_none_is_refused(box: list, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        format_boxes([{"label": "a", "box": box}], (32, 64))
    with pytest.raises(RowError, match=f"Row 5, column `objects`: .*objects.0..box.*{fault}"):
        row = {"image": picture(64, 32), "caption": "a", "objects": [{"label": "a", "box": box}]}
        check_task_row("boxes", row, 5)


def test_rounding_past_the_edge_is_forgiven() -> None:
    assert format_boxes([{"label": "a", "box": [0, -0.4, 64.5, 32]}], (32, 64)).endswith("(0, 0) -> (256, 256)")


@pytest.mark.parametrize("label", ["cat and with dog", "", "a at location (1"])
def test_a_label_that_could_not_be_read_back_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="must be a name"):
        format_boxes([{"label": label, "box": [0, 0, 1, 1]}], (3, 5))


def test_text_that_holds_no_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="'a cat' is no object"):
        parse_boxes("a cat")


def test_boxes_follow_the_cut_to_the_centred_square() -> None:
    objects = [
        {"label": "left", "box": [0, 0, 20, 32]},  # 4 of its 20 columns are seen
        {"label": "middle", "box": [24, 8, 40, 24]},
        {"label": "right", "box": [40, 0, 56, 32]},  # 8 of 16
    ]
    cropped, side = crop_boxes(objects, (32, 64))
    assert side == 32
    assert [(item["label"], item["box"]) for item in cropped] == [
        ("middle", [8, 8, 24, 24]),
        ("right", [24, 0, 32, 32]),
    ]
    assert [item["label"] for item in crop_boxes(objects, (32, 64), max_objects=1)[0]] == ["middle"]


def test_detection_formats_agree() -> None:
    wanted = [{"label": "cat", "box": [2, 3, 7, 13]}]
    corners = {"name": ["cat"], "bbox": [[2, 3, 7, 13]]}
    sizes = [{"name": "cat", "bbox": [2, 3, 5, 10]}]
    fractions = [{"name": "cat", "a": 0.1, "b": 0.1, "c": 0.35, "d": 13 / 30}]
    options = {"label_key": "name", "box_key": "bbox"}
    assert convert_boxes(corners, (30, 20), **options, box_format="xyxy") == wanted
    assert convert_boxes(sizes, (30, 20), **options, box_format="xywh") == wanted
    (found,) = convert_boxes(fractions, (30, 20), label_key="name", box_key=list("abcd"), box_format="fractions")
    assert found["box"] == pytest.approx(wanted[0]["box"])
    with pytest.raises(ValueError, match=r"fields \['label'\] are not there"):
        convert_boxes(sizes, (30, 20), label_key="label", box_key="bbox", box_format="xywh")


# Loading


def test_columns_of_a_named_source_become_slots(tmp_path: Path) -> None:
    columns = {
        "original_prompt": ["p", "p"],
        "original_image": [encoded(picture(color="red"))] * 2,
        "edit_prompt": [" make it blue ", "again"],
        "edited_prompt": ["q", "q"],
        "edited_image": [encoded(picture(color="blue"))] * 2,
    }
    name = saved(tmp_path, columns, original_image=Image(), edited_image=Image())
    rows = load_task_rows("instruct_pix2pix", dataset_name=name)
    assert {"image", "input_image", "instruction"} <= set(rows.column_names)
    assert rows["instruction"][:] == ["make it blue", "again"]
    assert rows.features["image"] == Image(decode=False)
    assert PILImage.open(io.BytesIO(rows[0]["image"]["bytes"])).getpixel((0, 0)) == (0, 0, 255)
    assert PILImage.open(io.BytesIO(rows[0]["input_image"]["bytes"])).getpixel((0, 0)) == (255, 0, 0)


def test_own_columns_are_named_and_free_columns_stay(tmp_path: Path) -> None:
    columns = {
        "photo": [encoded(picture())],
        "q": ["Which?"],
        "a": ["red"],
        "scene": ["{}"],
        "answer": ["x"],
        "mask": [encoded(picture())],
    }
    name = saved(tmp_path, columns, photo=Image(), mask=Image())
    rows = load_task_rows("vqa", dataset_name=name, columns={"image": "photo", "question": "q", "answer": "a"})
    assert set(rows.column_names) == {"image", "question", "answer", "scene"}
    assert rows[0]["answer"] == "red"


def test_nested_columns_are_reached_and_of_several_texts_one_is_taken(tmp_path: Path) -> None:
    columns = {
        "images": [[encoded(picture(7)), encoded(picture(9))]] * 3,
        "texts": [[{"user": "Which?", "assistant": "blue"}]] * 3,
        "answers": [[{"answer": text} for text in texts] for texts in (["a", "b", "b"], ["c", "d"], ["", "e"])],
    }
    name = saved(tmp_path, columns, images=List(Image()))
    paths = {"image": "images.1", "question": "texts.0.user", "answer": "answers.answer"}
    rows = load_task_rows(TaskSource("vqa", name, paths))
    assert rows["answer"][:] == ["b", "c", "e"]
    assert rows["question"][:] == ["Which?"] * 3
    assert PILImage.open(io.BytesIO(rows[0]["image"]["bytes"])).width == 9


def test_the_number_of_a_choice_becomes_its_words(tmp_path: Path) -> None:
    columns = {
        "image": [encoded(picture())] * 2, "question": ["Which?"] * 2, "choices": [["red", "blue", "pink"]] * 2,
        "answer": [2, 0], "hint": ["", "h"], "solution": ["Look.", ""],
    }  # fmt: skip
    name = saved(tmp_path, columns, image=Image())
    rows = load_task_rows("science_qa", dataset_name=name)  # whose configuration is that of the Hub
    assert rows["answer"][:] == ["pink", "red"]
    assert rows["choices"][0] == "(A) red (B) blue (C) pink"
    assert [fitting_templates("reasoning", row) for row in rows.remove_columns("image")] == [[0, 1], [0]]


def test_detection_rows_become_text_in_the_centred_square(tmp_path: Path) -> None:
    classes = ClassLabel(names=["cat", "sofa"])
    features = Features(
        {"image": Image(), "objects": {"category": List(classes), "bbox": List(List(Value("float64")))}}
    )
    objects = {"category": [1, 0, 0], "bbox": [[16, 0, 48, 32], [24, 8, 40, 24], [0, 0, 10, 10]]}
    rows = Dataset.from_dict({"image": [encoded(picture(64, 32))], "objects": [objects]}, features=features)
    rows.save_to_disk(str(tmp_path / "rows"))
    rows = load_task_rows("coco_boxes", dataset_name=tmp_path / "rows")
    assert rows[0]["caption"] == "sofa, cat"
    assert (
        rows[0]["objects"] == "sofa at location (0, 0) -> (256, 256) and with cat at location (64, 64) -> (192, 192)"
    )


def test_boxes_of_generated_rows_are_written_before_pictures_are_encoded(tmp_path: Path) -> None:
    columns = {"image": [picture(32, 32)], "caption": ["c"], "objects": [[{"label": "a", "box": [4, 8, 16, 32]}]]}
    rows = write_objects(Dataset.from_dict(columns).cast_column("image", Image()))
    assert rows[0]["objects"] == "a at location (32, 64) -> (128, 256)"
    assert write_objects(rows) is rows
    assert words(fill_template("boxes", {"caption": "c", "objects": rows[0]["objects"]}))[0][0].endswith("256)")


def vqa_rows(folder: Path, answers: list) -> str:
    count = len(answers)
    columns = {"image": [encoded(picture())] * count, "question": ["Which?"] * count, "answer": answers}
    return saved(folder, columns, image=Image())


def test_a_dataset_that_lacks_a_column_is_refused(tmp_path: Path) -> None:
    name = vqa_rows(tmp_path, ["red"])
    with pytest.raises(
        ValueError, match=r"lacks columns for the slots \['input_image', 'instruction'\] of task 'edit'"
    ):
        load_task_rows("edit", dataset_name=name)
    with pytest.raises(ValueError, match=r"slot `answer` is to be column 'replies'.*Columns there: \['image'"):
        load_task_rows("vqa", dataset_name=name, columns={"answer": "replies"})
    with pytest.raises(ValueError, match=r"`columns` names \['reply'\]"):
        load_task_rows("vqa", dataset_name=name, columns={"reply": "answer"})


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(ValueError, match="`source`='vqa3' is unknown"):
        load_task_rows("vqa3")
    with pytest.raises(ValueError, match="give a `dataset_name`, or one of its sources, .*'vizwiz'"):
        load_task_rows("vqa")


def test_misfits_are_refused_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = vqa_rows(tmp_path, ["red", "blue", " ", "pink"])
    with pytest.raises(RowError, match=r"Row 2, column `answer`: empty.*1 of 4 rows"):
        load_task_rows("vqa", dataset_name=name)
    rows = load_task_rows("vqa", dataset_name=name, max_misfit_share=0.25)
    assert rows["answer"][:] == ["red", "blue", "pink"]
    assert "1 of 4 rows" in capsys.readouterr().out
    with pytest.raises(RowError, match="2 of 4"):
        load_task_rows("vqa", dataset_name=vqa_rows(tmp_path / "b", ["", "", "a", "b"]), max_misfit_share=0.25)


def test_text_alone_loads(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in ("one", "two")))
    rows = load_task_rows("text", dataset_name=path, columns={"text": "body"})
    assert rows["text"][:] == ["one", "two"]


# Conversations


def image_part() -> dict:
    return {"type": "image", "image": picture()}


MESSAGES = [
    {"role": "user", "content": [image_part(), {"type": "text", "text": "make it blue"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Here:"}, image_part()]},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "You are welcome."},
]


def test_what_the_assistant_says_are_answers_and_turns_end_between() -> None:
    parts = conversation_parts(MESSAGES)
    assert [part["type"] for part in parts] == ["image", "text", "text", "image", "end_of_turn", "text", "text"]
    assert [part.get("is_answer") for part in parts] == [False, False, True, True, None, False, True]
    assert parts[0]["image"] is MESSAGES[0]["content"][0]["image"]


def test_conversations_that_teach_nothing_are_refused() -> None:
    with pytest.raises(RowError, match=r"Row 4, column `messages\[2\]`: the last message is of the role 'user'"):
        conversation_parts(MESSAGES[:3], number=4)
    with pytest.raises(RowError, match=r"Row 4, column `messages\[0\].content`: an empty text"):
        conversation_parts([{"role": "user", "content": " "}, MESSAGES[3]], number=4)
    with pytest.raises(RowError, match="`role`='bot'"):
        conversation_parts([{"role": "bot", "content": "hi"}], number=4)


def test_conversations_load_with_their_pictures_undecoded(tmp_path: Path) -> None:
    features = Features(
        {"talk": List({"role": Value("string"),
                       "content": List({"type": Value("string"), "text": Value("string"), "image": Image()})})}
    )  # fmt: skip
    good = [
        {"role": "user", "content": [{"type": "image", "text": None, "image": encoded(picture())}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a star", "image": None}]},
    ]
    bad = [{**good[0], "content": [{**good[0]["content"][0], "image": {"bytes": b"no", "path": None}}]}, good[1]]
    Dataset.from_dict({"talk": [good, bad]}, features=features).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(RowError, match="Row 1, column `messages`: `image` is no picture"):
        load_messages(tmp_path / "rows", column="talk")
    rows = load_messages(tmp_path / "rows", column="talk", max_misfit_share=0.5)
    assert len(rows) == 1
    assert rows[0]["messages"][0]["content"][0]["image"]["bytes"]
    with pytest.raises(ValueError, match=r"`column`='messages' is not there. Columns here: \['talk'\]"):
        load_messages(tmp_path / "rows")


# Mixtures


def test_weights_stay_within_the_clip_add_up_and_follow_the_wish_between() -> None:
    num_rows = {"a": 1_000_000, "b": 30_000, "c": 700, "d": 500_000}
    targets = {"a": 0.1, "b": 0.2, "c": 0.5, "d": 0.2}
    weights = mixture_weights(num_rows, targets)
    total = sum(num_rows.values())
    ratios = {name: weights[name] / (num_rows[name] / total) for name in num_rows}
    assert sum(weights.values()) == pytest.approx(1)
    assert all(0.3 - 1e-9 <= ratio <= 3 + 1e-9 for ratio in ratios.values())
    assert ratios["b"] == pytest.approx(3) and ratios["c"] == pytest.approx(3)
    factors = {name: weights[name] / targets[name] for name in ("a", "d") if 0.301 < ratios[name] < 2.99}
    assert len(factors) == 2 and factors["a"] == pytest.approx(factors["d"])


def test_a_wish_within_the_clip_is_granted_and_rows_alone_are_proportional() -> None:
    assert mixture_weights({"a": 30, "b": 70}, {"a": 2, "b": 2}) == pytest.approx({"a": 0.5, "b": 0.5})
    assert mixture_weights({"a": 30, "b": 70}, {"a": 30, "b": 70}) == pytest.approx({"a": 0.3, "b": 0.7})
    assert mixture_weights({"a": 30, "b": 70}, clip=(1, 1)) == pytest.approx({"a": 0.3, "b": 0.7})
    assert mixture_weights({"a": 3}) == {"a": 1}
    assert mixture_weights({"a": 1, "b": 999}) == pytest.approx({"a": 0.003, "b": 0.997})
    assert mixture_weights({"a": 1, "b": 999}, clip=None) == {"a": 0.5, "b": 0.5}
    assert mixture_weights({"a": 1, "b": 999}, {"a": 3, "b": 1}, clip=None) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (({"a": 1}, {"b": 1}), "`targets` names"),
        (({"a": 0}, None), "must be above 0"),
        (({"a": 1}, {"a": 0}), "Leave out a dataset"),
        (({"a": 1}, None, (2, 3)), "enclose 1"),
        (({}, None), "names"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(arguments: tuple, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        mixture_weights(*arguments)


@pytest.mark.parametrize("objects", [3, "ab", [3], [{"label": "a"}], [{"box": [0, 0, 1, 1]}]])
def test_objects_without_label_or_box_are_refused(objects: object) -> None:
    for use in (crop_boxes, format_boxes):
        with pytest.raises(ValueError, match="`objects"):
            use(objects, (32, 32))


@pytest.mark.parametrize(
    "objects",
    [3, [3], {"label": ["a"], "box": 3}, {"label": ["a", "b"], "box": [[0, 0, 1, 1]]}, [{"label": "a", "box": "abcd"}],
     [{"label": "a", "box": [0, {}, 1, 1]}]],
)  # fmt: skip
def test_detections_of_another_form_are_refused(objects: object) -> None:
    with pytest.raises(ValueError, match="`objects`=|must be four numbers"):
        convert_boxes(objects, (32, 32), label_key="label", box_key="box", box_format="fractions")
