"""A finished model as a folder that is a Hub repo: weights, processor, scheduler, index and card; and its upload."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, ModelCardData


NOT_UPLOADED = ["checkpoint-*", "logs/*", "*.tmp", "non_finite_*"]


def export_folder(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    *,
    card_template: str | Path,
    card_data: Mapping[str, Any],
    card_values: Mapping[str, Any],
) -> Path:
    """Writes a model for every door of transformers and diffusers, with a filled card.

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
    data = ModelCardData(library_name="hf_mm", pipeline_tag="text-to-image", **card_data)
    ModelCard.from_template(data, template_path=str(card_template), **card_values).save(folder / "README.md")
    return folder


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads an exported folder as one commit; checkpoints and logs stay at home.

    Args:
        folder (`str` or `Path`): From `export_folder`.
        repo_id (`str`): Hub repo, e.g. `me/my-model`; made if missing.
        private (`bool`, defaults to `False`): Whether a new repo is private.

    Returns:
        `str`: address of the commit.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), ignore_patterns=NOT_UPLOADED, commit_message="Upload model"
    )
    return str(commit.commit_url)
