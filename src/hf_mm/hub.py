"""A finished model as a folder that is a Hub repo: weights, processor, scheduler, index, code, card; its upload."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from .cold_load import __file__ as cold_load_script
from .cold_load import ask, needs_trust


NOT_UPLOADED = ["checkpoint-*", "logs/*", "*.tmp", "non_finite_*", "encoded/*"]
AUTO_MODELS = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForMultimodalLM": MODEL_FOR_MULTIMODAL_LM_MAPPING,
}
# diffusers looks for a component's code and weights in a folder of its name; transformers has both at the root.
FROM_ROOT = '''"""Loads this component from the root of the repo, where transformers has its files."""

import os

from transformers import {auto_class}, {base}


class {name}({base}):
    """Stands for the class at the root. Runs only where `trust_remote_code=True` was passed to diffusers."""

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """Loads from the folder above."""
        return {auto_class}.from_pretrained(os.path.dirname(folder), trust_remote_code=True, **kwargs)
'''
STUB = "from_root"


def export_folder(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    *,
    card_template: str | Path,
    card_data: Mapping[str, Any],
    card_values: Mapping[str, Any],
) -> Path:
    """Writes a model for every door of transformers and diffusers, with its code and a filled card.

    With hf_mm imported its own classes load the folder, and no trust is asked for; without it transformers does with
    `trust_remote_code=True`. For diffusers without hf_mm see `make_self_contained`.

    Args:
        pipeline (`DiffusionPipeline`): Model, processor and scheduler.
        folder (`str` or `Path`): Where to; made if missing.
        card_template (`str` or `Path`): Jinja template of the card, from `model_cards/`.
        card_data (`Mapping`): Front matter: licence, tags, datasets.
        card_values (`Mapping`): What the template's slots are filled with.

    Returns:
        `Path`: the folder.
    """
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    write_code(pipeline, folder)
    data = ModelCardData(library_name="hf_mm", pipeline_tag="text-to-image", **card_data)
    ModelCard.from_template(data, template_path=str(card_template), **card_values).save(folder / "README.md")
    return folder


def write_code(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Copies the code of model, processor and pipeline beside the weights, and notes in their files what is where.

    Args:
        pipeline (`DiffusionPipeline`): Of a family of hf_mm.
        folder (`str` or `Path`): With its saved files.
    """
    folder, config = Path(folder), pipeline.model.config
    processor = pipeline.processor
    for part in (pipeline.model, processor, processor.image_processor, pipeline):
        custom_object_save(part, folder)
    models = {name: _place_of(mapping[type(config)]) for name, mapping in AUTO_MODELS.items()}
    _update_json(folder / "config.json", {"auto_map": {"AutoConfig": _place_of(type(config)), **models}})
    of_processor = {"auto_map": {"AutoProcessor": _place_of(type(processor))}}
    of_images = {"auto_map": {"AutoImageProcessor": _place_of(type(processor.image_processor))}}
    _update_json(folder / "processor_config.json", {**of_processor, "image_processor": of_images})


def make_self_contained(folder: str | Path) -> None:
    """Makes diffusers load an exported folder without hf_mm; it then always needs `trust_remote_code=True` there.

    Args:
        folder (`str` or `Path`): From `export_folder`.
    """
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    pipeline_class = index["_class_name"]
    module = next(path.stem for path in folder.glob("pipeline_*.py"))
    parts = {
        "model": ("AutoModelForMultimodalLM", "PreTrainedModel"),
        "processor": ("AutoProcessor", "ProcessorMixin"),
    }
    for part, (auto_class, base) in parts.items():
        (folder / part).mkdir(exist_ok=True)
        code = FROM_ROOT.format(auto_class=auto_class, base=base, name=index[part][1])
        (folder / part / f"{STUB}.py").write_text(code, encoding="utf-8")
    names = {part: [STUB, index[part][1]] for part in parts}
    _update_json(folder / "model_index.json", {"_class_name": [module, pipeline_class], **names})


def check_cold_load(folder: str | Path) -> None:
    """Loads a folder in a process that cannot import hf_mm and compares what it answers, bit by bit, with this one's.

    Args:
        folder (`str` or `Path`): From `export_folder`; where it is self-contained, a drawn picture is compared too.

    Raises:
        RuntimeError: If it does not load there, or answers otherwise.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "answers.safetensors"
        command = [sys.executable, "-P", cold_load_script, str(Path(folder).resolve()), str(output)]
        # As many threads as here, for sums in another order differ in their last bits.
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
        if done.returncode:
            raise RuntimeError(f"{str(folder)!r} does not load without hf_mm:\n{done.stderr[-2000:]}")
        cold = load_file(output)
    warm = ask(folder, trust_remote_code=needs_trust(folder))
    shared = warm.keys() & cold.keys()
    if different := sorted(name for name in shared if not torch.equal(warm[name], cold[name])):
        raise RuntimeError(f"{str(folder)!r} answers otherwise without hf_mm: {different} differ.")


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads an exported folder as one commit; checkpoints, logs and encoded data stay at home.

    Args:
        folder (`str` or `Path`): From `export_folder`.
        repo_id (`str`): Hub repo, e.g. `me/my-model`; made if missing.
        private (`bool`, defaults to `False`): Whether a new repo is private.
        revision (`str`, *optional*): Branch, made if missing; none: the main one.

    Returns:
        `str`: address of the commit.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        ignore_patterns=NOT_UPLOADED,
        commit_message="Upload model",
        revision=revision,
    )
    return str(commit.commit_url)


def _place_of(part: type) -> str:
    """Names a class as transformers does in `auto_map`: its file, then itself."""
    return f"{part.__module__.rpartition('.')[-1]}.{part.__name__}"


def _update_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Changes fields of a JSON file, those of inner objects one by one; whole or not at all."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        content[name] = {**content[name], **value} if name in content and isinstance(value, dict) else value
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
