"""The contracts that families share instead of base classes, tested for every family."""

import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from PIL import Image
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from hf_mm.data.cm3_masking import CM3Masking
from hf_mm.data.collators import collate_documents
from hf_mm.data.mixing import DocumentArguments, SampleKey
from hf_mm.data.training_documents import CodeDocuments, NoisedDocuments
from hf_mm.text_to_image import build_drawing_pipeline


@dataclass
class Family:
    """A tiny model with its processor, what makes its documents of rows, and what its drawing takes besides."""

    model: torch.nn.Module
    processor: object
    documents: Callable[..., Any]
    drawing: dict[str, Any]


@pytest.fixture(
    params=[
        "transfusion",
        "transfusion_unet",
        "transfusion_rotary",
        "cm3leon",
        "cm3leon_grid",
        "cm3leon_rotary",
        "cm3leon_chameleon",
    ]  # fmt: skip
)
def family(request, make_model, make_processor, make_cm3leon, make_cm3leon_processor):
    if request.param.startswith("cm3leon"):
        variant = request.param.partition("_")[2] or "running"
        fields = {"image_positions": variant}
        if variant == "chameleon":
            fields = {"decoder_block": "chameleon", "objective": "causal", "z_loss_weight": 0.01}
        model = make_cm3leon(**fields)
        processor, config = make_cm3leon_processor(model.config), model.config
        names = ("break", "eos", "eoss", "first_sentinel")
        ids = {f"{name}_token_id": config.to_dict()[f"{name}_token_id"] for name in names}
        masking = CM3Masking(**ids, num_sentinel_tokens=config.num_sentinel_tokens, max_spans=5)
        masking = None if config.objective == "causal" else masking
        documents = partial(
            CodeDocuments, processor=processor, masking=masking, arguments=DocumentArguments(image_first_share=0.4)
        )
        return Family(model, processor, documents, {})
    variant = request.param.partition("_")[2]
    positions = "rotary" if variant == "rotary" else "running"
    model = make_model(patch_layer="unet" if variant == "unet" else "linear", patch_positions=positions)
    processor = make_processor(model.config)
    documents = partial(
        NoisedDocuments,
        processor=processor,
        image_size=8,
        latent_shape=(3, 8, 8),
        sample_timesteps=model.timestep_sampler(),
        arguments=DocumentArguments(image_first_share=0.4, noise_cap=500),
    )
    return Family(model, processor, documents, {"num_inference_steps": 2})


def png(seed):
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (9 + seed, 13, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (3, 8, 8), dtype=np.uint8)


def rows_of(form):
    texts = ["a red star", "kite", "two blue boxes", "a green moon", "an orange kite on white"]
    if form == "pair":
        return Dataset.from_dict({"image": [png(seed) for seed in range(5)], "text": texts})
    if form == "encoded pair":
        return Dataset.from_dict({"pixels": [pixels(seed) for seed in range(5)], "text": texts})
    if form == "text":
        return Dataset.from_dict({"text": texts})
    picture = Image.open(io.BytesIO(png(3)["bytes"]))
    return [
        {
            "content": [
                {"type": "text", "text": text},
                {"type": "image", "image": picture},
                {"type": "text", "text": "!"},
            ]
        }
        for text in texts
    ]


def with_codes(family, part):
    """A row or part of a document whose image is codes, as the recipe that encodes images leaves it."""
    if "pixels" in part:
        picture = Image.fromarray(np.asarray(part["pixels"], dtype=np.uint8).transpose(1, 2, 0))
    elif isinstance(part.get("image"), dict):
        picture = Image.open(io.BytesIO(part["image"]["bytes"]))
    elif "image" in part:
        picture = part["image"]
    else:
        return part
    pixel_values = family.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    codes = family.model.encode_images(pixel_values)[0] - family.model.config.first_image_token_id
    rest = {name: value for name, value in part.items() if name not in ("image", "pixels")}
    return {**rest, "codes": codes.tolist()}


def documents_of(family, form):
    rows = rows_of(form)
    if family.documents.func is CodeDocuments:
        rows = [
            {"content": [with_codes(family, part) for part in row["content"]]}
            if "content" in row
            else with_codes(family, row)
            for row in rows
        ]
        rows = rows if form == "document" else Dataset.from_list(rows)
    dataset = family.documents(rows, seed=3)
    return [dataset[SampleKey(number, 0, number)] for number in range(5)]


def collate(family, documents, **arguments):
    return collate_documents(documents, pad_token_id=family.processor.tokenizer.pad_token_id, **arguments)


FORMS = ["pair", "encoded pair", "document", "text"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window_length", [None, 64])
def test_every_row_format_becomes_a_batch_whose_keys_are_forwards_arguments(family, form, window_length):
    batch = collate(family, documents_of(family, form), window_length=window_length)
    arguments = inspect.signature(family.model.forward).parameters
    assert batch.keys() <= arguments.keys()
    loss = family.model.train()(**batch).loss
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()


@pytest.mark.parametrize("form", FORMS)
def test_counted_micro_batches_add_up_to_one_big_batch(family, form):
    documents, model = documents_of(family, form), family.model.train()
    whole = collate(family, documents)
    expected = model(**whole).loss
    counts = model.count_targets(whole)
    arguments = inspect.signature(model.forward).parameters
    assert counts.keys() <= arguments.keys()
    parts = [collate(family, documents[:2]), collate(family, documents[2:3]), collate(family, documents[3:])]
    part_counts = [model.count_targets(part) for part in parts]
    assert {name: sum(int(count[name]) for count in part_counts) for name in counts} == {
        name: int(count) for name, count in counts.items()
    }
    total = sum(model(**part, **counts).loss for part in parts)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_packed_windows_have_the_loss_of_separate_rows(family, form):
    documents, model = documents_of(family, form), family.model.train()
    torch.testing.assert_close(
        model(**collate(family, documents, window_length=61)).loss,
        model(**collate(family, documents)).loss,
        rtol=1e-4,
        atol=1e-4,
    )


def test_every_family_draws_by_the_same_arguments(family):
    pipe = build_drawing_pipeline(family.model, family.processor)
    pipe.set_progress_bar_config(disable=True)
    parameters = inspect.signature(pipe.__call__).parameters
    assert {"prompt", "image", "guidance_scale", "num_images_per_prompt", "generator"} <= parameters.keys()
    draw = partial(pipe, num_images_per_prompt=2, guidance_scale=1.5, **family.drawing)
    first, again = (draw(["kite", "a red star"], generator=torch.Generator().manual_seed(0)).images for _ in range(2))
    assert len(first) == 4 and all(isinstance(image, Image.Image) for image in first)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, again, strict=True))
    assert len(pipe("kite", image=first[0], **family.drawing).images) == 1


def test_offloaded_weights_are_brought_back_before_they_are_used(family):
    pipe = build_drawing_pipeline(family.model, family.processor)
    pipe.set_progress_bar_config(disable=True)
    state = {"is_there": False, "early": []}

    class Bring(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            state["is_there"] = True
            return args, kwargs

    def note(module, *args):
        if not state["is_there"]:
            state["early"].append(type(module).__name__)

    for module in family.model.model.modules():
        module.register_forward_pre_hook(note)
    add_hook_to_module(family.model, Bring())
    picture = Image.new("RGB", (8, 8), "red")
    user = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "kite"}]}]
    calls = {
        "draw": lambda: pipe("kite", num_images_per_prompt=2, **family.drawing),
        "edit": lambda: pipe("kite", image=picture, **family.drawing),
        "caption": lambda: pipe.caption(picture, max_new_tokens=2),
        "interleave": lambda: pipe.interleave("kite", max_new_tokens=2, max_images=1),
        "chat": lambda: pipe.chat(user, max_new_tokens=2, max_images=1),
    }
    for name, call in calls.items():
        state["is_there"] = False
        call()
        assert state["is_there"] and not state["early"], name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"truncation": True, "max_length": 5}, "conversations read `return_tensors` and `padding=True`"),
        ({"processor_kwargs": {"images_kwargs": {"do_resize": False}}}, "Leave out the others"),
        ({"padding": "max_length"}, "conversations read"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "contradict each other"),
    ],
)
def test_arguments_that_conversations_do_not_read_are_refused(family, fields, message):
    messages = [{"role": "user", "content": "kite"}, {"role": "assistant", "content": "a red star"}]
    encode = partial(family.processor.apply_chat_template, messages, tokenize=True, return_dict=True)
    assert encode(return_tensors="pt", padding=True)["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match=message):
        encode(**fields)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_arguments_of_the_librarys_generate_are_taken_or_refused_by_name(family, mode):
    prompt = torch.tensor([[family.processor.tokenizer.bos_token_id, 11, 12]])
    if mode == "image":
        with pytest.raises(
            ValueError, match="`num_return_sequences` is for text; images take `num_images_per_prompt`"
        ):
            family.model.generate(prompt, generation_mode="image", num_return_sequences=2)
        return
    write = partial(family.model.generate_interleaved, prompt, max_new_tokens=3, max_images=0)
    with pytest.raises(ValueError, match="`return_dict_in_generate`=True must be False here"):
        write(return_dict_in_generate=True)
    stopped = write(logits_processor=None, stopping_criteria=StoppingCriteriaList([StopAtOnce()]))
    assert len(stopped[0][0]) <= 1


class StopAtOnce(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool)
