"""What the page of `hf-mm demo` does: draw, caption, edit and converse, over one pipeline.

Knows a pipeline's calls, and how Gradio shows errors and messages; where things stand on the page is in `layout.py`.
How a picture is opened and documents are found comes as arguments.
"""

import html
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch
from PIL import Image

from .drawing import Progress, choose_seeds, draw


NO_TEXT = "(no text)"
PROMPTS = (
    "a red star on a white background",
    "a blue heart on a black background",
    "a large green key on a cream background",
    "a purple moon",
)

Message = dict[str, Any]

# Names of fields stand between backticks in errors, which the page shows as HTML.
CODE = re.compile("`([^`]+)`")


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows what is wrong with an input on the page, in a line, and nothing on the terminal."""
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        message = CODE.sub(r"<code>\1</code>", html.escape(" ".join(str(error).split())))
        raise gr.Error(message, print_exception=False) from error


class DemoPage:
    """What the page does, a method for each button.

    Args:
        pipeline (`DiffusionPipeline`): Of either family.
        name (`str`): Of the checkpoint, as the page shows it.
        open_picture (`Callable`): Opens the file of a picture as RGB, or raises a `ValueError`.
        retrieve (`Callable`, *optional*): Finds documents for a prompt: `retrieve(prompt, number)`, best first, as
            dictionaries of `text`, `score` and `image`.
        tasks (`Sequence[str]`, *optional*): What the model was tuned for.
        prompts (`Sequence[str]`): Examples to draw.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str,
        open_picture: Callable[[str], Image.Image],
        retrieve: Callable[[str, int], list[dict[str, Any]]] | None = None,
        tasks: Sequence[str] = (),
        prompts: Sequence[str] = PROMPTS,
    ) -> None:
        self.pipeline, self.name, self.open_picture, self.retrieve = pipeline, name, open_picture, retrieve
        self.tasks, self.prompts = tasks, prompts
        self.has_steps = "num_inference_steps" in inspect.signature(pipeline.__call__).parameters

    def draw(
        self,
        prompt: str,
        seed: float | None = None,
        num_images: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_retrieved: int = 0,
    ) -> Iterator[tuple[list[tuple[Image.Image, str]], str, list[tuple[Image.Image, str]]]]:
        """Draws pictures, showing them on the way.

        Args:
            prompt (`str`): What to draw.
            seed (`float`, *optional*): Seed of the first picture.
            num_images (`int`, defaults to 1): Pictures.
            guidance_scale (`float`, *optional*): How closely to follow the prompt.
            num_inference_steps (`int`, *optional*): Denoising steps, of Transfusion.
            num_retrieved (`int`, defaults to 0): Documents to retrieve, of CM3Leon.

        Yields:
            `tuple`: captioned pictures, a line about them, and what was retrieved.
        """
        with shown_errors():
            if not prompt.strip():
                raise ValueError("Say what to draw.")
            documents = self.retrieve(prompt, int(num_retrieved)) if self.retrieve and num_retrieved else []
            found = [(self.see(item), f"{item['score']:.2f}: {item['text']}") for item in documents]
            options: dict[str, Any] = {"guidance_scale": guidance_scale}
            if self.has_steps:
                options["num_inference_steps"] = num_inference_steps
            seeds = choose_seeds(None if seed is None else int(seed), int(num_images))
            for progress in draw(self.pipeline, prompt, seeds, documents=documents, **options):
                yield (*self.show(progress), found)

    def see(self, document: Mapping[str, Any]) -> Image.Image:
        """Shows a retrieved document: its picture, opened or decoded; an empty one where it is a text alone."""
        if "codes" in document:
            return self.pipeline.preview(torch.tensor([document["codes"]], device=self.pipeline.device))[0]
        return document["image"] if "image" in document else Image.new("RGB", (32, 32), "white")

    def show(self, progress: Progress) -> tuple[list[tuple[Image.Image, str]], str]:
        """Captions pictures with their seeds, and says how far they are."""
        pictures = [(picture, f"seed {seed}") for picture, seed in zip(progress.pictures, progress.seeds, strict=True)]
        seeds = ", ".join(map(str, progress.seeds))
        if progress.is_finished:
            return pictures, f"Done. Seed: {seeds}"
        return pictures, f"Step {progress.step} of {progress.num_steps}. Seed: {seeds}"

    def caption(self, path: str | None, prompt: str = "", max_new_tokens: int = 64) -> str:
        """Describes a picture, or answers a question about it.

        Args:
            path (`str`, *optional*): Its file; None is refused.
            prompt (`str`, defaults to `""`): How the text begins, or a question.
            max_new_tokens (`int`, defaults to 64): Longest text, in tokens.

        Returns:
            `str`: the text.
        """
        with shown_errors():
            picture = self.read(path)
            return self.pipeline.caption([picture], prompt, int(max_new_tokens))[0] or NO_TEXT

    def edit(
        self,
        path: str | None,
        prompt: str,
        seed: float | None = None,
        num_images: int = 1,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
    ) -> Iterator[tuple[list[tuple[Image.Image, str]], str]]:
        """Changes a picture as a prompt says, showing it on the way.

        Args:
            path (`str`, *optional*): Its file; None is refused.
            prompt (`str`): What to change.
            seed (`float`, *optional*): Seed of the first picture.
            num_images (`int`, defaults to 1): Pictures.
            guidance_scale (`float`, *optional*): How closely to follow the prompt.
            image_guidance_scale (`float`, *optional*): How closely to follow the picture.

        Yields:
            `tuple`: captioned pictures, and a line about them.
        """
        with shown_errors():
            picture = self.read(path)
            if not prompt.strip():
                raise ValueError("Say what to change.")
            seeds = choose_seeds(None if seed is None else int(seed), int(num_images))
            scales: dict[str, Any] = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
            for progress in draw(self.pipeline, prompt, seeds, image=picture, **scales):
                yield self.show(progress)

    def chat(
        self, message: Mapping[str, Any], messages: list[Message], seed: float | None = None
    ) -> tuple[list[dict[str, Any]], list[Message], dict[str, Any], str]:
        """Answers a message with text, a picture or both. One that cannot be answered is forgotten.

        Args:
            message (`Mapping`): `text`, and `files`, paths of pictures.
            messages (`list[dict]`): Turns so far.
            seed (`float`, *optional*): Of this answer.

        Returns:
            `tuple`: the conversation as the page shows it, its messages, an empty next message, and the seed.
        """
        with shown_errors():
            text = message["text"].strip()
            pictures = [{"type": "image", "image": self.read(path)} for path in message["files"]]
            if not text and not pictures:
                raise ValueError("Say something, or add a picture.")
            content = pictures + [{"type": "text", "text": text}] * bool(text)
            asked = [*messages, {"role": "user", "content": content}]
            (chosen,) = choose_seeds(None if seed is None else int(seed), 1)
            answer = self.pipeline.chat(asked, generator=torch.Generator().manual_seed(chosen))
        messages = [*asked, answer]
        shown = [part for said in messages for part in show_message(said)]
        return shown, messages, {"text": "", "files": []}, f"Seed: {chosen}"

    def read(self, path: str | None) -> Image.Image:
        """Opens an upload, refusing none."""
        if path is None:
            raise ValueError("Give a picture first.")
        return self.open_picture(path)


def show_message(message: Message) -> list[dict[str, Any]]:
    """Shows a message as Gradio's Chatbot does, a bubble for each part."""
    bubbles = [
        gr.Image(part["image"], format="png", show_label=False) if part["type"] == "image" else part["text"]
        for part in message["content"]
    ]
    return [{"role": message["role"], "content": bubble} for bubble in bubbles or [NO_TEXT]]
