"""A published model loads over HTTP in four ways, with answers equal bit for bit, and never without consent."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_mm.cold_load import PROMPT
from hf_mm.hub import publish


NAME, ADAPTER = "me/model", "me/adapter"

QUESTIONS = """
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

torch.set_num_threads(1)
name, prompt, output, revision = sys.argv[1:]
places = {"revision": None if revision == "none" else revision}

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np").images).contiguous()

@torch.no_grad()
def read(model, processor):
    ids = processor(text=[prompt], return_tensors="pt")["input_ids"]
    return ids, model.eval()(input_ids=ids).logits.float()

def load(**trust):
    model = AutoModelForMultimodalLM.from_pretrained(name, **places, **trust)
    return model, AutoProcessor.from_pretrained(name, **places, **trust)
"""
WITH_HF_MM = """
import hf_mm
from hf_mm.text_to_image import build_drawing_pipeline

model, processor = load()
ids, logits = read(model, processor)
save_file({"ids": ids, "logits": logits, "picture": draw(build_drawing_pipeline(model, processor))}, output)
"""
WITHOUT_HF_MM = """
sys.modules["hf_mm"] = None  # whatever imports it fails
pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **places)
by_diffusers = read(pipe.model, pipe.processor)
answers = {"picture": draw(pipe), "diffusers_ids": by_diffusers[0], "diffusers_logits": by_diffusers[1]}
model, processor = load(trust_remote_code=True)
answers["ids"], answers["logits"] = read(model, processor)
if revision == "none":
    from peft import PeftModel

    answers["adapted_logits"] = read(PeftModel.from_pretrained(model, "me/adapter"), processor)[1]
save_file(answers, output)
"""
WITHOUT_CONSENT = """
sys.modules["hf_mm"] = None
load()
"""


def answer(pipe):
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.processor(text=[PROMPT], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = pipe.model(input_ids=ids).logits.float()
    picture = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np").images
    return {"ids": ids, "logits": logits, "picture": torch.as_tensor(picture)}


def adapt(model, folder):
    """Puts adapters into a model that change what it answers, and saves them alone."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transfusion", "cm3leon"])
def test_a_published_model_answers_alike_in_all_four_ways(family, hub, make_pipeline, ask_process, tmp_path):
    pipe = make_pipeline(family)
    expected = answer(pipe)
    publish(pipe, NAME, private=True)  # whose download needs the token, as the code of it does
    adapt(pipe.model, tmp_path / "adapter")
    with torch.no_grad():
        expected["adapted_logits"] = pipe.model.eval()(input_ids=expected["ids"]).logits.float()
    assert not torch.equal(expected["adapted_logits"], expected["logits"])
    publish(tmp_path / "adapter", ADAPTER, base_model=NAME)

    for code in (WITH_HF_MM, WITHOUT_HF_MM):
        ask_process(QUESTIONS + code, NAME, PROMPT, tmp_path / "answers", "none")
        for name, tensor in load_file(tmp_path / "answers").items():
            assert torch.equal(tensor, expected[name.removeprefix("diffusers_")]), name
    assert "trust_remote_code=True" in ask_process(
        QUESTIONS + WITHOUT_CONSENT, NAME, PROMPT, tmp_path / "answers", "none", fails=True
    )
