"""Pipelines and pictures of the commands: loaded, asked for options they have, saved.

Knows names, folders and files; what is drawn with them, the commands know.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image

from .cm3leon import CM3LeonPipeline
from .text_to_image import CHECKPOINTS, DEFAULT_CHECKPOINT
from .transfusion import TransfusionPipeline


# What libraries raise about parts of a checkpoint that are cut off, changed or mixed up, beside errors of their own.
DAMAGES = (AttributeError, IndexError, JSONDecodeError, KeyError, NotImplementedError, TypeError, UnicodeDecodeError)


def find_checkpoint(model: str | None) -> str:
    """Finds a checkpoint that ships with the package by its name, such as `cm3leon-tiny`.

    Args:
        model (`str`, *optional*): A name, folder or Hub id; defaults to `transfusion-icons`.

    Returns:
        `str`: its folder, or what was given where none that ships has this name.
    """
    if model is None:
        return str(DEFAULT_CHECKPOINT)
    shipped = CHECKPOINTS / Path(model).name
    return str(shipped) if shipped.name == model and shipped.is_dir() and not Path(model).exists() else model


def load_pipeline(model: str | None, trust_remote_code: bool) -> DiffusionPipeline:
    """Loads the pipeline of a checkpoint onto the accelerator, if there is one.

    Args:
        model (`str`, *optional*): As for `find_checkpoint`.
        trust_remote_code (`bool`): Whether code of the checkpoint may run.

    Returns:
        `DiffusionPipeline`: whose progress bar is shown on terminals only.

    Raises:
        ValueError: If the folder holds no pipeline, or a configuration in it does not fit.
        OSError: If there is no such checkpoint, or its files are damaged.
    """
    for library in (transformers, diffusers):  # their bars of loading; those of downloads and of drawing stay
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    name = find_checkpoint(model)
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise ValueError(
            f"--model {name} holds no pipeline: it has no model_index.json. recipes/pretrain.py writes one."
        )
    if Path(name).is_dir():
        check_index(Path(name) / "model_index.json")
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise missing_model(f"--model {name}", name, error) from error
    except DAMAGES as error:
        raise OSError(
            f"--model {name} cannot be loaded ({type(error).__name__}: {error}). Its files are damaged: get them anew."
        ) from error
    pipeline.set_progress_bar_config(disable=None, desc="Drawing")
    return pipeline.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))


def check_index(path: Path) -> None:
    """Refuses an index of a pipeline that does not name a class, and a library and a class of each part.

    Raises:
        OSError: Naming the file.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(f"{path} is damaged: {error}. Get it anew.") from error
    parts = index if isinstance(index, dict) else {}
    named = [value for name, value in parts.items() if not name.startswith("_")]
    if "_class_name" not in parts or not all(isinstance(value, list) and len(value) == 2 for value in named):
        raise OSError(
            f"{path} is damaged: it must name a `_class_name`, and [library, class] of each part. Get it anew."
        )


def load_reader(model: str | None, trust_remote_code: bool, deed: str) -> CM3LeonPipeline | TransfusionPipeline:
    """Loads a pipeline that reads pictures, refusing others.

    Args:
        model (`str`, *optional*): As for `load_pipeline`.
        trust_remote_code (`bool`): Likewise.
        deed (`str`): What it is needed for.

    Raises:
        ValueError: If the checkpoint holds another kind of pipeline.
    """
    pipeline = load_pipeline(model, trust_remote_code)
    if not isinstance(pipeline, CM3LeonPipeline | TransfusionPipeline):
        raise ValueError(f"--model {model} is a {type(pipeline).__name__}, which does not {deed}.")
    return pipeline


def missing_model(argument: str, name: str, error: OSError) -> OSError:
    """Says that there is no such model, here or on the Hub; what is wrong with a folder, its error says."""
    if Path(name).is_dir():
        return error
    return OSError(
        f"{argument} is no folder here, and the Hub has no such model or cannot be reached. Give a folder that "
        "recipes/pretrain.py wrote, or a Hub id."
    )


def check_retrieves(pipeline: DiffusionPipeline) -> None:
    """Refuses a pipeline that draws without documents only."""
    if "retrieved" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"--retrieval-dir, --num-retrieved: a {type(pipeline).__name__} does not retrieve.")


def asked_for(options: Mapping[str, Any], pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Keeps the options that were given, refusing those that the pipeline of this checkpoint does not have."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - inspect.signature(pipeline.__call__).parameters.keys()):
        flags = ", ".join("--" + name.replace("_", "-") for name in unknown)
        raise ValueError(f"{flags}: a {type(pipeline).__name__} has no such option. Leave it out.")
    return given


def save_pictures(pictures: Sequence[Image.Image], output: Path) -> list[Path]:
    """Saves pictures, each whole or not at all: the first as `output`, the next with `-1`, `-2` in their names.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): The pictures.
        output (`Path`): Name of the first; its folder is made if missing.

    Returns:
        `list[Path]`: where they are.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    names = [output.name, *(f"{output.stem}-{number}{output.suffix}" for number in range(1, len(pictures)))]
    paths = [output.with_name(name) for name in names]
    for picture, path in zip(pictures, paths, strict=True):
        partial = path.with_name(f".{path.name}.partial{path.suffix}")  # Pillow goes by the ending
        try:
            picture.save(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return paths
