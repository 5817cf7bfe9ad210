"""Texts, messages and options for the doors that read prompts."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from .models import build_pipelines
from .values import NUMBERS, mutate, odd_text, odd_value


OPTIONS = {
    "guidance_scale": NUMBERS,
    "image_guidance_scale": NUMBERS,
    "num_images_per_prompt": (0, 1, 2, -1, 1.5, "2", True, [1], 2**40),
    "height": (0, 4, 8, 16, 7, -8, 8.0, "8", 2**31, True),
    "width": (0, 4, 8, 12, 9, -8, 8.5, [8], 10**12, None),
    "output_type": ("pil", "np", "pt", "latent", "codes", "", "png", None, 3),
    "generator": ("one", "list", "empty", 7, "x"),
}
OWN_OPTIONS = {
    "transfusion": {
        "num_inference_steps": (0, 1, 2, -1, 1.5, "2", 10**9, True, [2]),
        "latents": ("fits", "small", "flat", 3, "x"),
    },
    "cm3leon": {
        "num_candidates": (0, 1, 3, 1.5, "2"),
        "do_sample": (True, False, None, 0, "yes"),
        "temperature": NUMBERS,
        "top_k": (0, 1, 5, 10**9, -1, 1.5, "3"),
        "top_p": NUMBERS,
        "decoding": ("top_p", "contrastive", "mixed", "", "greedy", None, 3),
        "contrastive_k": (0, 1, 3, 23, 24, -1, 1.5, "2"),
        "contrastive_alpha": NUMBERS,
        "amateur_temperature": NUMBERS,
        "num_retrieved": (0, 1, -1, "2"),
        "retrieved": ("one", "many", "textless", "codes", "odd"),
        "cache_implementation": ("static", "dynamic", "x", 3),
    },
}


class PromptInputs:
    """Draws prompts and the door that each is given to.

    Args:
        folder (`Path`): Not needed.
    """

    def __init__(self, folder: Path) -> None:
        self.pipelines = build_pipelines()
        self.picture = Image.new("RGB", (9, 8), "red")

    def draw(self, rng: Random) -> tuple[str, Callable[[], Any], str]:
        """Returns the name of a door, a call of it, and the input as text."""
        family = rng.choice(list(self.pipelines))
        pipeline = self.pipelines[family]
        doors = {
            self._processor: 0.3,
            self._document: 0.15,
            self._conversation: 0.15,
            self._drawing: 0.25,
            self._writing: 0.15,
        }
        (make,) = rng.choices(list(doors), list(doors.values()))
        door, call, shown = make(pipeline, family, rng)
        return f"{family} {door}", call, f"{shown!r}"[:600]

    def _prompts(self, rng: Random) -> Any:
        """Draws one prompt or a list of them; now and then neither."""
        kind = rng.random()
        if kind < 0.55:
            return odd_text(rng)
        if kind < 0.9:
            return [odd_text(rng, 300) for _ in range(rng.choice((0, 1, 2, 3)))]
        return odd_value(rng)

    def _processor(self, pipeline: Any, family: str, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        text = self._prompts(rng)
        images = rng.choice((None, None, self.picture, [self.picture], [self.picture] * 2, []))
        padding = rng.choice((True, True, False, "longest", "max_length"))
        options = {"images": images, "padding": padding, "return_tensors": rng.choice(("pt", "pt", None))}
        return "processor", lambda: pipeline.processor(text=text, **options), (text, options)

    def _document(self, pipeline: Any, family: str, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        picture: dict[str, Any] = {"type": "image", "size": [8, 8], "codes": list(range(16)), "is_answer": False}
        content = [{"type": "text", "text": odd_text(rng)}, picture, {"type": "text", "text": odd_text(rng, 99)}]
        if rng.random() < 0.2:
            content.insert(rng.randrange(3), {"type": "end_of_turn"})
        door = "document"
        if family == "cm3leon" and rng.random() < 0.4:
            door = "infill prompt"
            picture["mask"] = [rng.random() < 0.5 for _ in range(16)]
            content.insert(rng.randrange(3), {"type": "mask"})
        content = mutate(content, rng) if rng.random() < 0.6 else content
        processor = pipeline.processor
        lay_out = processor.infill_prompt if door == "infill prompt" else processor.encode_document
        return door, lambda: lay_out(content), content

    def _messages(self, rng: Random) -> Any:
        """Draws a conversation."""
        parts = [{"type": "text", "text": odd_text(rng, 99)}, {"type": "image", "image": self.picture}]
        messages: list[Any] = [
            {"role": rng.choice(("user", "system")), "content": rng.choice((odd_text(rng, 200), parts))},
            {"role": "assistant", "content": odd_text(rng, 99)},
            {"role": "user", "content": rng.choice((odd_text(rng), parts[::-1]))},
        ][: rng.choice((0, 1, 2, 3))]
        return mutate(messages, rng) if rng.random() < 0.6 else messages

    def _conversation(self, pipeline: Any, family: str, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        messages = self._messages(rng)
        options = {
            "tokenize": rng.random() < 0.8,
            "return_dict": rng.random() < 0.7,
            "return_tensors": rng.choice(("pt", None)),
            "add_generation_prompt": rng.random() < 0.5,
            "continue_final_message": rng.random() < 0.2,
            "return_assistant_tokens_mask": rng.random() < 0.2,
        }
        return "template", lambda: pipeline.processor.apply_chat_template(messages, **options), (messages, options)

    def _drawing(self, pipeline: Any, family: str, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        prompt = self._prompts(rng)
        options: dict[str, Any] = {"guidance_scale": 1.0}
        choices = {**OPTIONS, **OWN_OPTIONS[family]}
        for name in rng.sample(list(choices), rng.choice((0, 0, 1, 1, 2))):
            options[name] = rng.choice(choices[name])
        if rng.random() < 0.25:
            options["image"] = rng.choice((self.picture, [self.picture], [self.picture] * 2, []))
        shown = dict(options)
        filled = {name: self._fill(name, value, prompt, rng) for name, value in options.items()}
        return "drawing", lambda: pipeline(prompt, **filled), (prompt, shown)

    def _fill(self, name: str, value: Any, prompt: Any, rng: Random) -> Any:
        """Makes what cannot stand in a table: generators, latents and documents."""
        documents = {"text": odd_text(rng, 99), "image": self.picture}
        made = {
            ("generator", "one"): torch.Generator(),
            ("generator", "list"): [torch.Generator()],
            ("generator", "empty"): [],
            ("latents", "fits"): torch.zeros(1, 3, 8, 8),
            ("latents", "small"): torch.zeros(1, 3, 4, 8),
            ("latents", "flat"): torch.zeros(64),
            ("retrieved", "one"): [[documents]],
            ("retrieved", "many"): [[documents] * 5],
            ("retrieved", "textless"): [[{"image": self.picture}]],
            ("retrieved", "codes"): [[{"text": "a", "codes": [rng.choice((0, 22, 23, -1))] * rng.choice((16, 15))}]],
            ("retrieved", "odd"): mutate([[documents]], rng),
        }
        return made.get((name, value), value) if isinstance(value, str) else value

    def _writing(self, pipeline: Any, family: str, rng: Random) -> tuple[str, Callable[[], Any], Any]:
        text, room = self._prompts(rng), rng.choice((1, 2, 2, 0, -1, 1.5, "3", 10**9, True))
        room = 2 if rng.random() < 0.8 else room
        deeds = ["caption", "interleave", "chat"] + ["infill_caption", "infill_region"] * (family == "cm3leon")
        deed = rng.choice(deeds)
        images = rng.choice((self.picture, [self.picture], [self.picture] * 2, []))
        call: Callable[[], Any]
        if deed == "caption":
            call = lambda: pipeline.caption(images, text, max_new_tokens=room)  # noqa: E731
        elif deed == "interleave":
            given = rng.choice((None, None, [self.picture]))
            call = lambda: pipeline.interleave(  # noqa: E731
                text, given, max_images=1, max_new_tokens=room, guidance_scale=1.0
            )
        elif deed == "chat":
            text = self._messages(rng)
            call = lambda: pipeline.chat(text, max_new_tokens=room, guidance_scale=1.0)  # noqa: E731
        elif deed == "infill_caption":
            text = f"{text}___" if rng.random() < 0.5 else text
            call = lambda: pipeline.infill_caption(images, text, max_new_tokens=room)  # noqa: E731
        else:
            box = rng.choice(
                ((0, 0, 8, 8), (2, 2, 5, 5), (0, 0, 9, 8), (4, 4, 4, 4), (1, 2), None, "box", (0, 0, 3.5, 4))
            )
            call = lambda: pipeline.infill_region(images, box, text)  # noqa: E731
        return deed, call, (text, room)
