"""A finished model as a folder that is a Hub repo: weights, processor, scheduler, index, code, card; its publishing.

Knows what belongs into a repo, and that it is to load without hf_mm; how it is sent, `hub_upload` knows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from .cards import HERE, complete_card, rename, write_card
from .cold_load import __file__ as cold_load_script
from .cold_load import ask, needs_trust
from .hub_upload import LIBRARY, check_target, list_files, upload


MAX_SHARD_SIZE = "5GB"
WEIGHTS_DTYPES = ("bfloat16", "float16")
TASK = "text-to-image"
AUTO_MODELS = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForMultimodalLM": MODEL_FOR_MULTIMODAL_LM_MAPPING,
}
# diffusers looks for a component's code and files in a folder of its name, and downloads no code from elsewhere.
STUB = "from_root"
STUBS = {
    "model": '''"""Loads the model with the code beside this file, and the weights at the root of the repo."""

import os

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


class {name}(PreTrainedModel):
    """Stands for the class of that name. Runs only where `trust_remote_code=True` was passed to diffusers."""

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """Loads the weights of the folder above."""
        model_class = get_class_from_dynamic_module("{place}", folder)
        return model_class.from_pretrained(os.path.dirname(folder), **kwargs)
''',
    "processor": '''"""Loads the processor with the code and the files beside this file."""

from transformers import AutoProcessor, ProcessorMixin


class {name}(ProcessorMixin):
    """Stands for `{place}`. Runs only where `trust_remote_code=True` was passed to diffusers."""

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """Loads this folder."""
        return AutoProcessor.from_pretrained(folder, trust_remote_code=True, **kwargs)
''',
}
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export_folder(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    *,
    card_template: str | Path,
    card_data: Mapping[str, Any],
    card_values: Mapping[str, Any],
    max_shard_size: int | str = MAX_SHARD_SIZE,
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
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Largest file of weights.

    Returns:
        `Path`: the folder.
    """
    folder = Path(folder)
    save_parts(pipeline, folder, max_shard_size)
    write_code(pipeline, folder)
    write_card(folder, card_template, {"library_name": LIBRARY, "pipeline_tag": TASK, **card_data}, card_values)
    return folder


def save_parts(pipeline: DiffusionPipeline, folder: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Saves model, processor and scheduler, and removes the weights of another saving, which would be loaded first.

    Args:
        pipeline (`DiffusionPipeline`): Of a family of hf_mm.
        folder (`Path`): Where to.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Largest file of weights.
    """
    before = {path: path.stat().st_mtime_ns for path in folder.glob("model*.safetensors")}
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    for path, time in before.items():
        if path.is_file() and path.stat().st_mtime_ns == time:
            path.unlink()
    if (folder / "model.safetensors").is_file():
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)


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
    if needs_trust(folder):  # it is already
        return
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    module = next(path.stem for path in folder.glob("pipeline_*.py"))
    processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    models = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    places = {
        "model": [models["AutoModelForMultimodalLM"]],
        "processor": [
            processor["auto_map"]["AutoProcessor"],
            processor["image_processor"]["auto_map"]["AutoImageProcessor"],
        ],
    }
    for part, template in STUBS.items():
        (folder / part).mkdir(exist_ok=True)
        code = [folder / f"{place.partition('.')[0]}.py" for place in places[part]]
        needed = {path for file in code for path in [file, *map(Path, get_relative_import_files(file))]}
        for path in needed | ({folder / name for name in PROCESSOR_FILES} if part == "processor" else set()):
            shutil.copyfile(path, folder / part / path.name)
        stub = template.format(name=index[part][1], place=places[part][0])
        (folder / part / f"{STUB}.py").write_text(stub, encoding="utf-8")
    names = {part: [STUB, index[part][1]] for part in STUBS}
    _update_json(folder / "model_index.json", {"_class_name": [module, index["_class_name"]], **names})


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


def publish(
    model: DiffusionPipeline | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    self_contained: bool = True,
    base_model: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    weights_dtype: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Publishes a model on the Hub in one commit, after checking that it loads and answers alike without hf_mm.

    What was sent before a cut is not sent again by the same call. The folder itself stays as it is. Checkpoints, logs
    and encoded data stay at home.

    Args:
        model (`DiffusionPipeline`, `str` or `Path`): A pipeline of a family of hf_mm; or a folder: from
            `export_folder`, of adapters that PEFT saved, of an image tokenizer or of a CLIP.
        repo_id (`str`): Hub repo, e.g. `me/my-model`; made if missing.
        private (`bool`, defaults to `False`): Whether a new repo is private.
        revision (`str`, *optional*): Branch, made if missing; none: the main one.
        token (`str`, *optional*): That may write; none: the one of `hf auth login` or of `HF_TOKEN`.
        overwrite (`bool`, defaults to `False`): Whether to write into a repo that holds something else.
        self_contained (`bool`, defaults to `True`): Whether diffusers is to load it without hf_mm too, for which it
            then always asks for `trust_remote_code=True`; see `make_self_contained`.
        base_model (`str`, *optional*): Hub id of the model that adapters belong on; none: the one that PEFT noted.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Largest file of weights.
        weights_dtype (`str`, *optional*): Type that weights are rounded to, `"bfloat16"` or `"float16"`; see
            `round_weights`.
        commit_message (`str`, defaults to `"Upload model"`): First line of the commit.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: If the folder holds no model or pickled weights, or the repo something else.
        ConnectionError: If the Hub is not reached, or lost on the way.
        PermissionError: If there is no token, a wrong one, or one that may not write.
        RuntimeError: If the model does not load without hf_mm, or answers otherwise there.
    """
    api = HfApi(token=token)
    if not isinstance(model, DiffusionPipeline):
        list_files(model)
    check_target(api, repo_id, private=private, revision=revision, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repo"
        if isinstance(model, DiffusionPipeline):
            save_parts(model, folder)
        else:
            stage_folder(model, folder)
        if weights_dtype is not None:
            round_weights(folder, weights_dtype)
        complete_repo(folder, self_contained=self_contained, base_model=base_model, max_shard_size=max_shard_size)
        rename(folder, {HERE: repo_id})
        if (folder / "model_index.json").is_file():
            check_cold_load(folder)
        return upload(
            api,
            folder,
            repo_id,
            private=private,
            revision=revision,
            overwrite=overwrite,
            commit_message=commit_message,
        )


def stage_folder(folder: str | Path, staged: Path) -> None:
    """Puts what is to be published of a folder into another, where it can be changed; weights are linked.

    Args:
        folder (`str` or `Path`): Of a model.
        staged (`Path`): Where to.
    """
    for name in list_files(folder):
        source, target = Path(folder, name).resolve(), staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            target.symlink_to(source)
        else:
            shutil.copyfile(source, target)


def round_weights(folder: Path, weights_dtype: str) -> None:
    """Rounds the weights of a folder to a type of two bytes, for half the download.

    The model computes as before: `from_pretrained` goes on giving it the type that `config.json` names.

    Args:
        folder (`Path`): Of a model; a file of weights that is a link is replaced by a file. It is changed.
        weights_dtype (`str`): `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: If the type is another one, a weight is beyond its range, or there is no `model.safetensors`.
    """
    if weights_dtype not in WEIGHTS_DTYPES:
        raise ValueError(f"`weights_dtype`={weights_dtype!r} must be one of {list(WEIGHTS_DTYPES)}.")
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"`weights_dtype`={weights_dtype!r} rounds model.safetensors, and the folder has none.")
    weights = load_file(path)
    rounded = {
        name: weight.to(getattr(torch, weights_dtype)) if weight.is_floating_point() else weight
        for name, weight in weights.items()
    }
    if lost := sorted(name for name, weight in rounded.items() if not weight.isfinite().all()):
        raise ValueError(f"`weights_dtype`={weights_dtype!r} cannot hold {lost[:3]}, which are not finite in it.")
    draft = folder / "model.safetensors.tmp"
    save_file(rounded, draft, metadata={"format": "pt"})
    draft.replace(path)


def complete_repo(
    folder: Path, *, self_contained: bool, base_model: str | None = None, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Adds to a staged folder what a repo of its kind needs to load elsewhere.

    Args:
        folder (`Path`): Of a pipeline, adapters, an image tokenizer or a CLIP. It is changed.
        self_contained (`bool`): Whether diffusers is to load a pipeline without hf_mm.
        base_model (`str`, *optional*): Of adapters.
        max_shard_size (`int` or `str`): Largest file of weights.

    Raises:
        ValueError: If it holds no model, or `base_model` is missing or given for something else.
    """
    split_weights(folder, max_shard_size)
    if (folder / "model_index.json").is_file():
        if not any(folder.glob("pipeline_*.py")):
            write_code(DiffusionPipeline.from_pretrained(folder), folder)
        if self_contained:
            make_self_contained(folder)
        complete_card(folder, library_name=LIBRARY, pipeline_tag=TASK)
    elif (folder / "adapter_config.json").is_file():
        before, base = find_base_model(folder, base_model)
        complete_card(folder, library_name="peft", base_model=base)
        rename(folder, {before: base})
        return
    elif (folder / "config.json").is_file():
        is_of_diffusers = "_class_name" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
        complete_card(folder, library_name="diffusers" if is_of_diffusers else "transformers")
    else:
        raise ValueError(
            "The folder holds no model: neither model_index.json nor adapter_config.json nor config.json. "
            "recipes/pretrain.py writes one that does; `save_pretrained` too."
        )
    if base_model is not None:
        raise ValueError(f"`base_model`={base_model!r} is for adapters, and the folder holds no adapter_config.json.")


def find_base_model(folder: Path, base_model: str | None) -> tuple[str, str]:
    """Finds the model that adapters belong on, and notes it where PEFT looks for it.

    Args:
        folder (`Path`): That PEFT saved. It is changed.
        base_model (`str`, *optional*): Hub id; none: the one that is noted.

    Returns:
        `tuple[str, str]`: what was noted before, and its Hub id.

    Raises:
        ValueError: If what is noted is no Hub id but a folder of this machine.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    before = settings["base_model_name_or_path"] or ""
    base = base_model or before
    if not base or Path(base).exists() or base.count("/") != 1:
        raise ValueError(
            f"The adapters belong on {base!r}, which is no Hub id. Publish that model first and name it with "
            "`base_model`, e.g. me/my-model."
        )
    _update_json(folder / "adapter_config.json", {"base_model_name_or_path": base})
    return before, base


def split_weights(folder: Path, max_shard_size: int | str) -> None:
    """Splits `model.safetensors` into files of at most some size with an index, where it is larger.

    Args:
        folder (`Path`): Of a model. It is changed.
        max_shard_size (`int` or `str`): Bytes, or such as `"5GB"`.
    """
    whole = folder / "model.safetensors"
    if not whole.is_file():
        return
    weights = load_file(whole)
    if split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size).is_sharded:
        whole.unlink()
        save_torch_state_dict(
            weights, folder, filename_pattern=whole.name.replace(".", "{suffix}."), max_shard_size=max_shard_size
        )


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
