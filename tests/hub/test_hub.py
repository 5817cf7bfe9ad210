"""A folder that is a Hub repo: it answers alike with hf_mm and without, through transformers and diffusers."""

import json

import pytest
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor

from hf_mm.hub import check_cold_load, make_self_contained


def test_with_hf_mm_its_own_classes_load_the_folder_and_no_trust_is_asked_for(folder):
    for loaded in (AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
        assert type(loaded).__module__.startswith("hf_mm.")
    assert type(AutoModel.from_pretrained(folder)).__module__.startswith("hf_mm.")
    assert type(DiffusionPipeline.from_pretrained(folder)).__module__.startswith("hf_mm.")


@pytest.mark.slow
def test_without_hf_mm_a_folder_answers_alike_through_transformers_and_through_diffusers(folder):
    check_cold_load(folder)
    make_self_contained(folder)
    check_cold_load(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.slow
def test_a_folder_that_does_not_load_without_hf_mm_or_answers_otherwise_is_refused(folder):
    module = next(folder.glob("modeling_*.py"))
    code = module.read_text()
    module.write_text(code.replace("import torch\n", "import torch\nimport hf_mm\n", 1))
    with pytest.raises(RuntimeError, match="does not load without hf_mm"):
        check_cold_load(folder)
    head = "self.lm_head(slice_logits_to_keep"
    assert head in code
    module.write_text(code.replace(head, f"2 * {head}"))
    with pytest.raises(RuntimeError, match="answers otherwise without hf_mm: .*logits"):
        check_cold_load(folder)


def test_the_notes_of_code_name_files_that_are_there(folder):
    notes = json.loads((folder / "config.json").read_text())["auto_map"]
    processor = json.loads((folder / "processor_config.json").read_text())
    notes |= processor["auto_map"] | processor["image_processor"]["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor"} <= notes.keys()
    for place in notes.values():
        file, name = place.split(".")
        assert f"class {name}" in (folder / f"{file}.py").read_text()
    pipeline_class = json.loads((folder / "model_index.json").read_text())["_class_name"]
    (pipeline_file,) = folder.glob("pipeline_*.py")
    assert f"class {pipeline_class}" in pipeline_file.read_text()
    assert not list(folder.glob("__init__.py"))
