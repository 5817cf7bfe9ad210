"""Where things stand on the page of `hf-mm demo`: tabs, fields, buttons and examples.

Knows Gradio and the names of the page's methods.
"""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from .page import DemoPage


PICTURES = Path(__file__).parent / "pictures"
STAR, HEART = str(PICTURES / "star.png"), str(PICTURES / "heart.png")
# Text to begin with beside a picture: none describes it.
QUESTIONS = ((STAR, ""), (HEART, "Question: what color is the heart? Answer:"))
EDITS = ((STAR, "make the star blue"), (HEART, "put it on a yellow background"))
MESSAGES = ((STAR, "describe the picture"), (HEART, "make it green"))
# Drawings of a few pixels are shown by their pixels, not smeared, and as large as there is room.
STYLE = """<style>
.drawn img, .picture img { image-rendering: pixelated; object-fit: contain !important; }
.picture img { width: 100% !important; height: 100% !important; min-width: 128px; min-height: 128px; }
</style>"""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def lay_out(page: DemoPage) -> gr.Blocks:
    """Lays a page out.

    Args:
        page ([`DemoPage`]): What its buttons do.

    Returns:
        `gradio.Blocks`: to launch.
    """
    family = type(page.pipeline).__name__.removesuffix("Pipeline")
    with gr.Blocks(title=f"hf-mm: {page.name}", analytics_enabled=False) as blocks:
        gr.HTML(STYLE, padding=False)
        gr.Markdown(f"# {html.escape(page.name)}\nA {family} model that reads and writes text and pictures.")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                gallery, to_caption, to_edit = lay_out_drawing(page)
            with gr.Tab("Caption", id="caption"):
                captioned = lay_out_caption(page)
            with gr.Tab("Edit", id="edit"):
                edited = lay_out_editing(page)
            with gr.Tab("Chat", id="chat"):
                lay_out_chat(page)
        pass_on(gallery, tabs, {"caption": (to_caption, captioned), "edit": (to_edit, edited)})
    return blocks


def lay_out_drawing(page: DemoPage) -> tuple[gr.Gallery, gr.Button, gr.Button]:
    """Lays out the tab that draws.

    Args:
        page ([`DemoPage`]): What its buttons do.

    Returns:
        `tuple`: its pictures, and the buttons that pass one of them on to be captioned and edited.
    """
    config = page.pipeline.model.config
    retrieves = page.retrieve is not None
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="What to draw", elem_id="draw-prompt")
            seed, number = seed_and_number("draw")
            scale = gr.Slider(1, 10, value=config.drawing_guidance_scale, step=0.1, label="Guidance")
            default = config.num_inference_steps if page.has_steps else 1
            limit = max(100, default)
            steps = gr.Slider(1, limit, value=default, step=1, label="Denoising steps", visible=page.has_steps)
            documents = gr.Slider(0, 4, value=1, step=1, label="Retrieved documents", visible=retrieves)
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw-button")
                stop = gr.Button("Stop", elem_id="draw-stop")
        with gr.Column():
            pictures = gallery_of("Pictures", "draw-pictures")
            status = gr.Markdown(elem_id="draw-status")
            with gr.Row():
                to_caption = gr.Button("Caption it", size="sm", elem_id="draw-to-caption")
                to_edit = gr.Button("Edit it", size="sm", elem_id="draw-to-edit")
            found = gallery_of("Retrieved", "draw-retrieved", columns=4, visible=retrieves)
    inputs = [prompt, seed, number, scale, steps, documents]
    outputs = [pictures, status, found]
    drawing = gr.on([button.click, prompt.submit], page.draw, inputs, outputs, api_name="draw", **ONE_AT_A_TIME)
    example = one_click([[text] for text in page.prompts], [prompt], page.draw, inputs, outputs, "draw")
    stop.click(None, cancels=[drawing, example])
    return pictures, to_caption, to_edit


def lay_out_caption(page: DemoPage) -> gr.Image:
    """Lays out the tab that describes pictures; returns where the picture is given."""
    with gr.Row():
        with gr.Column():
            picture = upload("caption")
            prompt = gr.Textbox(label="How the text begins, or a question", elem_id="caption-prompt")
            length = gr.Slider(1, 256, value=64, step=1, label="Tokens at most")
            button = gr.Button("Caption", variant="primary", elem_id="caption-button")
        with gr.Column():
            text = gr.Textbox(label="Text", lines=3, elem_id="caption-text")
    inputs, outputs = [picture, prompt, length], [text]
    button.click(page.caption, inputs, outputs, api_name="caption", **ONE_AT_A_TIME)
    one_click([list(row) for row in QUESTIONS], [picture, prompt], page.caption, inputs, outputs, "caption")
    return picture


def lay_out_editing(page: DemoPage) -> gr.Image:
    """Lays out the tab that edits pictures; returns where the picture is given."""
    note_untuned(page, "edit", "an edit may have little to do with the picture")
    with gr.Row():
        with gr.Column():
            picture = upload("edit")
            prompt = gr.Textbox(label="What to change", elem_id="edit-prompt")
            seed, number = seed_and_number("edit")
            scale = gr.Slider(
                1, 10, value=page.pipeline.model.config.drawing_guidance_scale, step=0.1, label="Guidance"
            )
            image_scale = gr.Slider(1, 5, value=1.5, step=0.1, label="Guidance by the picture")
            with gr.Row():
                button = gr.Button("Edit", variant="primary", elem_id="edit-button")
                stop = gr.Button("Stop", elem_id="edit-stop")
        with gr.Column():
            pictures = gallery_of("Pictures", "edit-pictures")
            status = gr.Markdown(elem_id="edit-status")
    inputs, outputs = [picture, prompt, seed, number, scale, image_scale], [pictures, status]
    editing = gr.on([button.click, prompt.submit], page.edit, inputs, outputs, api_name="edit", **ONE_AT_A_TIME)
    example = one_click([list(row) for row in EDITS], [picture, prompt], page.edit, inputs, outputs, "edit")
    stop.click(None, cancels=[editing, example])
    return picture


def lay_out_chat(page: DemoPage) -> None:
    """Lays out the tab of conversations of text and pictures."""
    note_untuned(page, "chat", "an answer may have little to do with the question")
    messages = gr.State([])
    shown = gr.Chatbot(label="Conversation", elem_id="chat-shown", elem_classes="picture")
    message = gr.MultimodalTextbox(
        label="Message", file_count="multiple", file_types=["image"], sources=["upload"], elem_id="chat-message"
    )
    with gr.Row():
        seed = gr.Number(label="Seed (empty: a new one)", precision=0, elem_id="chat-seed")
        clear = gr.Button("Begin anew", elem_id="chat-clear")
    status = gr.Markdown(elem_id="chat-status")
    inputs, outputs = [message, messages, seed], [shown, messages, message, status]
    message.submit(page.chat, inputs, outputs, api_name="chat", **ONE_AT_A_TIME)
    clear.click(lambda: ([], [], {"text": "", "files": []}, ""), None, outputs)
    rows = [[{"text": text, "files": [picture]}] for picture, text in MESSAGES]
    one_click(rows, [message], page.chat, inputs, outputs, "chat")


def pass_on(gallery: gr.Gallery, tabs: gr.Tabs, targets: dict[str, tuple[gr.Button, gr.Image]]) -> None:
    """Lets buttons take the picture chosen in a gallery, the first unless one is, to other tabs.

    Args:
        gallery (`gradio.Gallery`): Of files.
        tabs (`gradio.Tabs`): Of the page.
        targets (`dict`): For each tab's id the button, and where its picture is given.
    """
    chosen = gr.State(0)

    def choose(event: gr.SelectData) -> int:
        return event.index

    def take(pictures: list[tuple[str, str]] | None, number: int) -> str:
        if not pictures:
            raise gr.Error("Draw a picture first.", print_exception=False)
        return pictures[min(number, len(pictures) - 1)][0]

    gallery.select(choose, None, chosen)
    for tab, (button, target) in targets.items():
        taken = button.click(take, [gallery, chosen], target)
        taken.success(lambda tab=tab: gr.Tabs(selected=tab), None, tabs)


def upload(tab: str) -> gr.Image:
    """A place for a picture, which gives the path of its file.

    Gradio would open the file itself, and fail in its own words before the page could say what is wrong with it.
    """
    picture = gr.Image(
        type="filepath", image_mode=None, label="Picture", height=280, elem_id=f"{tab}-picture", elem_classes="picture"
    )
    picture.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return picture


def seed_and_number(tab: str) -> tuple[gr.Number, gr.Slider]:
    """Fields of the seed and the number of pictures, side by side."""
    with gr.Row():
        seed = gr.Number(label="Seed (empty: a new one)", precision=0, elem_id=f"{tab}-seed")
        number = gr.Slider(1, 8, value=1, step=1, label="Pictures", elem_id=f"{tab}-number")
    return seed, number


def gallery_of(label: str, elem_id: str, **options: Any) -> gr.Gallery:
    """A gallery that shows drawings as they are."""
    return gr.Gallery(
        label=label,
        elem_id=elem_id,
        elem_classes="drawn",
        format="png",
        object_fit="contain",
        interactive=False,
        **{"columns": 2, **options},
    )


def one_click(
    rows: list[list[Any]], fields: list[Any], run: Any, inputs: list[Any], outputs: list[Any], tab: str
) -> Any:
    """Lays out examples, each of which fills its fields and runs; returns the event of the running."""
    examples = gr.Examples(rows, fields, elem_id=f"{tab}-examples", api_visibility="private")
    return examples.load_input_event.then(run, inputs, outputs, api_visibility="private", **ONE_AT_A_TIME)


def note_untuned(page: DemoPage, task: str, meaning: str) -> None:
    """Says on a tab what to expect of a model that was not tuned for it."""
    if task not in page.tasks:
        gr.Markdown(f"*This model's folder does not tell of tuning on `{task}`: {meaning}.*")
