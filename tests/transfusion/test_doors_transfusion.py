import copy

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_mm import (
    TransfusionConfig,
    TransfusionForConditionalGeneration,
    TransfusionModel,
    TransfusionPipeline,
    TransfusionProcessor,
)


HEADS = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]


@pytest.fixture(scope="module")
def folder(make_model, make_processor, tiny_vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_model(vae_config=tiny_vae)
    TransfusionPipeline(model, make_processor(model.config), model.default_scheduler()).save_pretrained(path)
    return path


def test_the_folder_holds_every_librarys_files(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "model_index.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "scheduler/scheduler_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("auto_class", HEADS)
def test_auto_classes_with_a_head_load_the_same_model(folder, make_model, tiny_vae, auto_class):
    model = auto_class.from_pretrained(folder)
    assert type(model) is TransfusionForConditionalGeneration
    ids = torch.tensor([[1, 11, 12]])
    assert torch.equal(model(input_ids=ids).logits, make_model(vae_config=tiny_vae)(input_ids=ids).logits)


def test_other_auto_classes_load_their_parts(folder):
    assert type(AutoConfig.from_pretrained(folder)) is TransfusionConfig
    assert type(AutoModel.from_pretrained(folder)) is TransfusionModel
    assert type(AutoProcessor.from_pretrained(folder)) is TransfusionProcessor
    assert AutoTokenizer.from_pretrained(folder).boi_token == "<boi>"


@pytest.mark.parametrize("pipeline_class", [DiffusionPipeline, AutoPipelineForText2Image, TransfusionPipeline])
def test_diffusers_loads_the_pipeline(folder, pipeline_class):
    pipe = pipeline_class.from_pretrained(folder)
    assert type(pipe) is TransfusionPipeline
    pipe.set_progress_bar_config(disable=True)
    assert pipe("kite").images[0].size == (8, 8)
    assert not any(weight.requires_grad for weight in pipe.model.vae.parameters())


def test_a_loaded_pipeline_saves_again(folder, tmp_path):
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    ids = torch.tensor([[1, 11, 12]])
    first, second = (AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits for path in (folder, tmp_path))
    assert torch.equal(first, second)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is TransfusionPipeline


def test_a_loaded_model_trains(folder):
    model = AutoModelForMultimodalLM.from_pretrained(folder).train()
    ids = torch.tensor([[1, 11, 3, 5, 5, 4, 2]])
    model(input_ids=ids, labels=ids, latents=torch.randn(1, 5, 2, 4)).loss.backward()
    assert model.model.patch_in.projection.weight.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in model.vae.parameters())


def test_text_to_image_draws(folder):
    pipe = pipeline("text-to-image", model=str(folder))
    assert pipe("kite").size == (8, 8)
    assert [image.size for image in pipe(["kite", "a red star", "moon"], height=4, width=12)] == [(12, 4)] * 3


def test_any_to_any_writes_and_draws(folder):
    pipe = pipeline("any-to-any", model=str(folder))
    written = pipe("a red", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("a red")
    drawn = pipe("a red star", generation_mode="image")
    assert drawn[0]["generated_image"].size == (8, 8)
    assert len(pipe(["kite", "moon"], generation_mode="image")) == 2


def test_image_text_to_text_describes(folder, picture):
    pipe = pipeline("image-text-to-text", model=str(folder))
    written = pipe(images=picture(), text="<image>a", max_new_tokens=4, do_sample=False)
    assert isinstance(written[0]["generated_text"], str)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "kite"}]}]
    assert pipe(text=chat, max_new_tokens=4, do_sample=False)[0]["generated_text"]


def test_text_generation_writes(folder):
    pipe = pipeline("text-generation", model=str(folder))
    assert pipe("a red", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("a red")


@pytest.mark.parametrize(
    "door",
    [
        TransfusionForConditionalGeneration.from_pretrained,
        TransfusionModel.from_pretrained,
        TransfusionConfig.from_pretrained,
        AutoModelForMultimodalLM.from_pretrained,
    ],
)
def test_a_checkpoint_of_another_family_is_refused_by_name(tmp_path, tokenizer, door):
    plain = copy.deepcopy(tokenizer.backend_tokenizer)
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=41, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises((ValueError, KeyError), match="(?i)llama"):
        door(tmp_path)
