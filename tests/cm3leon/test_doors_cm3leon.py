import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from hf_mm import (
    CM3LeonConfig,
    CM3LeonForConditionalGeneration,
    CM3LeonImageProcessor,
    CM3LeonModel,
    CM3LeonPipeline,
    CM3LeonProcessor,
)


HEADS = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
IDS = torch.tensor([[2, 11, 12]])


@pytest.fixture(scope="module")
def folder(make_model, make_processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_model()
    CM3LeonPipeline(model, make_processor(model.config)).save_pretrained(path)
    return path


def test_the_folder_holds_every_librarys_files(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "model_index.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("auto_class", HEADS)
def test_auto_classes_with_a_head_load_the_same_model(folder, make_model, auto_class):
    model, made = auto_class.from_pretrained(folder), make_model()
    assert type(model) is CM3LeonForConditionalGeneration
    assert torch.equal(model(input_ids=IDS).logits, made(input_ids=IDS).logits)
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(model.encode_images(pixels), made.encode_images(pixels))


def test_other_auto_classes_load_their_parts(folder, make_model):
    assert type(AutoConfig.from_pretrained(folder)) is CM3LeonConfig
    backbone = AutoModel.from_pretrained(folder)
    assert type(backbone) is CM3LeonModel
    expected = make_model().model(input_ids=IDS).last_hidden_state
    assert torch.equal(backbone(input_ids=IDS).last_hidden_state, expected)
    assert type(AutoProcessor.from_pretrained(folder)) is CM3LeonProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is CM3LeonImageProcessor
    assert AutoTokenizer.from_pretrained(folder).break_token == "<break>"


@pytest.mark.parametrize("auto_class", HEADS)
def test_auto_classes_build_from_a_configuration(make_config, auto_class):
    assert type(auto_class.from_config(make_config())) is CM3LeonForConditionalGeneration


@pytest.mark.parametrize("pipeline_class", [DiffusionPipeline, AutoPipelineForText2Image, CM3LeonPipeline])
def test_diffusers_loads_the_pipeline(folder, pipeline_class):
    pipe = pipeline_class.from_pretrained(folder)
    assert type(pipe) is CM3LeonPipeline
    pipe.set_progress_bar_config(disable=True)
    assert pipe("kite").images[0].size == (8, 8)
    assert not any(weight.requires_grad for weight in pipe.model.image_tokenizer.parameters())


def test_a_loaded_pipeline_saves_again(folder, tmp_path):
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    first, second = (AutoModelForCausalLM.from_pretrained(path)(input_ids=IDS).logits for path in (folder, tmp_path))
    assert torch.equal(first, second)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is CM3LeonPipeline


def test_a_loaded_model_trains(folder):
    model = AutoModelForMultimodalLM.from_pretrained(folder).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad.any()
    assert not any(weight.requires_grad for weight in model.image_tokenizer.parameters())


def test_text_to_image_draws(folder):
    pipe = pipeline("text-to-image", model=str(folder))
    assert pipe("kite").size == (8, 8)
    assert [image.size for image in pipe(["kite", "a red star", "moon"])] == [(8, 8)] * 3


def test_any_to_any_writes_and_draws(folder):
    pipe = pipeline("any-to-any", model=str(folder))
    assert pipe("a red", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("a red")
    assert pipe("a red star", generation_mode="image")[0]["generated_image"].size == (8, 8)
    assert len(pipe(["kite", "moon"], generation_mode="image")) == 2


def test_image_text_to_text_describes(folder, picture):
    pipe = pipeline("image-text-to-text", model=str(folder))
    for text in ("<image>", "<image>a"):
        written = pipe(images=picture(), text=text, max_new_tokens=4, do_sample=False)
        assert isinstance(written[0]["generated_text"], str)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "kite"}]}]
    assert pipe(text=chat, max_new_tokens=4, do_sample=False)[0]["generated_text"]


def test_text_generation_writes(folder):
    pipe = pipeline("text-generation", model=str(folder))
    assert pipe("a red", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("a red")


@pytest.mark.parametrize(
    "door",
    [CM3LeonForConditionalGeneration.from_pretrained, CM3LeonModel.from_pretrained, CM3LeonConfig.from_pretrained],
)
def test_a_checkpoint_of_another_family_is_refused_by_name(tmp_path, door):
    AutoConfig.for_model("llama", hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type.*'llama'.*'cm3leon'"):
        door(tmp_path)
