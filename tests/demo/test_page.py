"""The page's functions, without a browser; one test goes through its server."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
from PIL import Image

import hf_mm
from hf_mm.checkpoint_info import TASKS
from hf_mm.data.formats import open_image


gr = pytest.importorskip("gradio", reason='the demo needs Gradio: pip install -e ".[demo]"')
from hf_mm.demo.layout import HEART, STAR  # noqa: E402
from hf_mm.demo.page import DemoPage  # noqa: E402


open_upload = partial(open_image, field="The upload")


@pytest.fixture(scope="module")
def page(transfusion):
    return DemoPage(transfusion, "tiny", open_upload, tasks=["edit"])


@pytest.fixture(scope="module")
def code_page(cm3leon):
    """Of a CM3Leon that retrieves."""
    memory = [
        {"text": "a star", "image": open_upload(STAR), "score": 0.75},
        {"text": "a heart", "codes": [1] * cm3leon.model.config.tokens_per_image, "score": 0.5},
    ]
    return DemoPage(cm3leon, "codes", open_upload, retrieve=lambda prompt, number: memory[:number])


def message_of(error):
    return error.value.message


@pytest.mark.parametrize("name", ["page", "code_page"])
def test_pictures_are_drawn_with_their_seeds_and_again_by_them(name, request):
    page = request.getfixturevalue(name)
    first, *_, last = page.draw("a red star", 5, 2, 2.0, 9)
    assert first[1].startswith("Step ") and last[1] == "Done. Seed: 5, 6"
    assert [caption for _, caption in last[0]] == ["seed 5", "seed 6"]
    *_, again = page.draw("a red star", 6, 1, 2.0, 9)
    pairs = zip(again[0][0][0].tobytes(), last[0][1][0].tobytes(), strict=True)
    assert max(abs(one - other) for one, other in pairs) <= 1  # of 255: sums of another batch
    *_, new = page.draw("a red star", None, 1, 2.0, 9)
    assert new[1].startswith("Done. Seed: ") and new[1] != again[1]


def test_retrieved_documents_are_shown_and_read(code_page):
    *_, (plain, _, none) = code_page.draw("a red star", 5)
    *_, (drawn, _, found) = code_page.draw("a red star", 5, num_retrieved=2)
    assert none == [] and [caption for _, caption in found] == ["0.75: a star", "0.50: a heart"]
    assert found[0][0].size == (96, 96)
    size = code_page.pipeline.model.config.image_size
    assert found[1][0].size == (size, size)
    assert drawn[0][0].tobytes() != plain[0][0].tobytes()


@pytest.mark.parametrize("prompt", ["красная звезда на белом фоне", "赤い星", "zxqv blorp", "🚀", "ein roter Stern"])
def test_prompts_of_unknown_words_and_other_languages_draw_something(page, prompt):
    *_, (pictures, status, _) = page.draw(prompt, 5, 1, 3.0, 3)
    assert status.startswith("Done") and pictures[0][0].size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("  ",), "Say what to draw."),
        (("a star", -3), "The seed is -3"),
        (("a <boi>",), "special token &#x27;&lt;boi&gt;&#x27;"),
        (("star " * 300,), "Shorten the prompt"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(page, arguments, words):
    with pytest.raises(gr.Error) as error:
        list(page.draw(*arguments))
    assert words in message_of(error) and "\n" not in message_of(error)
    assert not error.value.print_exception


def save(path, picture, **options):
    picture.save(path, **options)
    return str(path)


@pytest.mark.parametrize("kind", ["large", "animated", "cmyk", "one pixel", "grey 16 bit", "transparent"])
def test_odd_pictures_are_captioned_and_edited(page, tmp_path, kind):
    path = {
        "large": lambda: save(tmp_path / "a.png", Image.new("RGB", (7100, 7100), "red")),
        "animated": lambda: save(
            tmp_path / "a.gif",
            Image.new("RGB", (40, 30), "red"),
            save_all=True,
            append_images=[Image.new("RGB", (40, 30), "blue")],
        ),
        "cmyk": lambda: save(tmp_path / "a.jpg", Image.new("CMYK", (40, 30), (0, 200, 200, 0))),
        "one pixel": lambda: save(tmp_path / "a.png", Image.new("RGB", (1, 1), "red")),
        "grey 16 bit": lambda: save(tmp_path / "a.png", Image.new("I;16", (40, 30), 40000)),
        "transparent": lambda: save(tmp_path / "a.png", Image.new("RGBA", (40, 30), (200, 0, 0, 90))),
    }[kind]()
    assert page.caption(path, "", 5)
    if kind == "large":  # once is enough: opening it takes seconds
        return
    *_, (pictures, status) = page.edit(path, "make it blue", 5, 1, 1.0, 1.0)
    assert len(pictures) == 1 and status == "Done. Seed: 5"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "The upload is empty"),
        (b"no picture", "no picture in a format"),
        ("too many", "too large"),
        (None, "Give a picture"),
    ],
)
def test_uploads_that_are_no_pictures_are_refused_in_a_line(page, tmp_path, content, words):
    path = None if content is None else str(tmp_path / "a.png")
    if content == "too many":
        Image.new("1", (14000, 14000)).save(path)
    elif content is not None:
        (tmp_path / "a.png").write_bytes(content)
    for run in (
        lambda: page.caption(path),
        lambda: list(page.edit(path, "make it blue")),
        lambda: page.chat({"text": "what is it?", "files": [path]}, []),
    ):
        with pytest.raises(gr.Error) as error:
            run()
        told = re.sub("</?code>", "", message_of(error))  # of the fields' names
        assert words in told and not {"\n", "`"} & set(told)


def test_an_edit_needs_words(page):
    with pytest.raises(gr.Error, match="Say what to change"):
        list(page.edit(STAR, ""))


@pytest.mark.parametrize("name", ["page", "code_page"])
def test_a_conversation_grows_by_question_and_answer_and_forgets_what_failed(name, request):
    page = request.getfixturevalue(name)
    shown, messages, emptied, status = page.chat({"text": "red", "files": [HEART]}, [], 5)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert isinstance(shown[0]["content"], gr.Image) and shown[1]["content"] == "red"
    assert shown[2]["role"] == "assistant" and status == "Seed: 5" and emptied == {"text": "", "files": []}
    for text, words in (("", "Say something"), ("a <image>", "<code>messages</code>|special token")):
        before = list(messages)
        with pytest.raises(gr.Error, match=words):
            page.chat({"text": text, "files": []}, messages)
        assert messages == before


SERVED = """
import json, sys
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
import gradio as gr
from hf_mm.cli import build_demo
from hf_mm.demo.layout import STAR

page = build_demo(sys.argv[2], examples=["a green kite"])
blocks = list(page.blocks.values())
seen = {
    "tabs": [block.label for block in blocks if isinstance(block, gr.Tab)],
    "notes": [block.value for block in blocks if isinstance(block, gr.Markdown) and "does not tell" in (block.value or "")],
    "steps": [block.value for block in blocks if isinstance(block, gr.Slider) and block.label == "Denoising steps"],
    "prompts": [block.samples for block in blocks if isinstance(block, gr.Dataset)][0],
}
_, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
asked = Client(address, verbose=False)
seen["caption"] = asked.predict(handle_file(STAR), "", 9, api_name="/caption")
pictures, seen["status"], _ = asked.predict("a red star", 5, 1, 3.0, 3, 0, api_name="/draw")
seen["captions"] = [picture["caption"] for picture in pictures]
try:
    asked.predict(handle_file(sys.argv[1]), "", 5, api_name="/caption")
except AppError as error:
    seen["error"] = str(error)
print(json.dumps(seen))
"""


def test_the_page_is_served_and_says_what_is_wrong_with_an_upload(page, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    untold = tmp_path / "model"  # that says of no task that it was tuned for it
    shutil.copytree(hf_mm.CHECKPOINTS / "transfusion-tiny", untold, ignore=shutil.ignore_patterns(TASKS))
    # In a process of its own: Gradio leaves loops and sockets to the garbage collector, which warns of them.
    command = [sys.executable, "-c", SERVED, str(tmp_path / "a.png"), str(untold)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["tabs"] == ["Draw", "Caption", "Edit", "Chat"] and seen["prompts"] == [["a green kite"]]
    told = [task for task in ("edit", "chat") if any(f"`{task}`" in note for note in seen["notes"])]
    assert told == ["edit", "chat"]
    assert seen["steps"] == [page.pipeline.model.config.num_inference_steps]
    assert seen["caption"] == page.caption(STAR, "", 9)
    assert seen["status"] == "Done. Seed: 5" and seen["captions"] == ["seed 5"]
    assert "The upload" in seen["error"] and "no picture in a format" in seen["error"]
    assert "Traceback" not in done.stderr
