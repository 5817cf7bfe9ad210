import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import LlamaConfig, LlamaForCausalLM

import hf_mm
from hf_mm import CM3LeonPipeline
from hf_mm.checkpoint_info import describe_checkpoint, drawing_bytes, spell_checkpoint


TASKS = """| source | score | step 0 | step 4500 |
| --- | --- | --- | --- |
| edit@icon_scenes:shapes | edit_success | 3.1% | 50.0% |
| edit@icon_scenes:shapes | rest_kept | 4.7% | 53.1% |
| vqa@my/questions | answer_accuracy | 0.0% | 68.8% |
"""


@pytest.fixture(scope="module")
def codes(make_cm3leon, make_cm3leon_processor, tmp_path_factory):
    """A folder of a CM3Leon in three files of weights, in bfloat16."""
    folder, model = tmp_path_factory.mktemp("codes"), make_cm3leon()
    CM3LeonPipeline(model.bfloat16(), make_cm3leon_processor(model.config)).save_pretrained(
        folder, max_shard_size="20KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_parts_add_up_to_the_parameters_of_the_model_that_is_loaded(codes):
    for folder, parts in (
        (hf_mm.DEFAULT_CHECKPOINT, {"embeddings", "transformer", "patch layers", "image tokenizer"}),
        (hf_mm.CHECKPOINTS / "transfusion-tiny", {"embeddings", "transformer", "patch layers"}),
        (codes, {"embeddings", "transformer", "image tokenizer"}),
    ):
        facts = describe_checkpoint(str(folder))
        model = DiffusionPipeline.from_pretrained(folder).model
        counts = dict(facts["parameters"])
        total = counts.pop("total")
        assert counts.keys() == parts and sum(counts.values()) == total == model.num_parameters()
        assert facts["memory"]["float32"]["load"] == 4 * total == 2 * facts["memory"]["bfloat16"]["load"]
        assert facts["pictures"]["size"] == model.config.image_size


@pytest.mark.parametrize(("block", "family"), [("cm3leon", "CM3Leon"), ("chameleon", "Chameleon")])
def test_a_family_is_called_as_in_its_paper(block, family, make_cm3leon, tmp_path):
    fields = {"hidden_act": "silu", "tie_word_embeddings": False} if block == "chameleon" else {}
    make_cm3leon(decoder_block=block, **fields).save_pretrained(tmp_path)
    assert describe_checkpoint(str(tmp_path))["family"] == family


def test_what_the_folder_says_is_told(codes, tmp_path):
    facts = describe_checkpoint(str(codes))
    assert (facts["family"], facts["dtypes"], facts["tuned_for"]) == ("CM3Leon", ["BF16"], [])
    assert facts["vocabulary"]["codes"] == 23 and facts["vocabulary"]["sentinels"] == 7 and facts["context"] == 128
    tuned = tmp_path / "tuned"
    shutil.copytree(hf_mm.CHECKPOINTS / "transfusion-tiny", tuned)
    (tuned / "tasks.md").write_text(TASKS)
    facts = describe_checkpoint(str(tuned))
    assert facts["family"] == "Transfusion" and facts["pictures"] == {"size": 32, "positions": 64}
    assert facts["tuned_for"] == [
        {"task": "edit", "dataset": "icon_scenes:shapes", "scores": {"edit_success": 0.5, "rest_kept": 0.531}},
        {"task": "vqa", "dataset": "my/questions", "scores": {"answer_accuracy": 0.688}},
    ]
    text = spell_checkpoint(facts)
    assert "edit 50.0%, vqa 68.8%" in text and "in float32" in text and "32 x 32 px, 64 positions" in text


def test_drawing_needs_more_memory_in_a_larger_model_and_with_guidance(make_config, make_cm3leon_config):
    for make in (make_config, make_cm3leon_config):
        config = make()
        plain = drawing_bytes(config, 4)
        assert drawing_bytes(config, 2) < plain
        config.drawing_guidance_scale = 1
        assert drawing_bytes(config, 4) < plain
    wide, deep = make_cm3leon_config(hidden_size=40), make_cm3leon_config(num_hidden_layers=6)
    plain = drawing_bytes(make_cm3leon_config(), 4)
    assert drawing_bytes(wide, 4) > plain and drawing_bytes(deep, 4) > plain


def test_what_cannot_be_described_is_refused_with_what_would_be_right(tmp_path):
    llama, adapter, pickled = (tmp_path / name for name in ("llama", "adapter", "pickled"))
    config = LlamaConfig(vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=1,
                         num_attention_heads=3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(llama)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base"}))
    shutil.copytree(hf_mm.DEFAULT_CHECKPOINT, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    damaged = tmp_path / "damaged"
    shutil.copytree(hf_mm.DEFAULT_CHECKPOINT, damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    for folder, words in (
        (llama, "is a llama; described are CM3Leon and Transfusion"),
        (adapter, "an adapter alone, on top of me/base"),
        (pickled, "no weights in safetensors"),
        (damaged, "damaged"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            describe_checkpoint(str(folder))
        assert str(folder) in str(error.value)
    with pytest.raises(OSError):  # the tests are offline
        describe_checkpoint("me/nowhere")
    assert not Path("me").exists()
