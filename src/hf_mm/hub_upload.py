"""Sends a folder to the Hub as one commit; says in one line what went wrong.

Knows the Hub, its errors and files by their names. Does not know what a model is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects


LIBRARY = "hf_mm"
NOT_UPLOADED = [
    "checkpoint-*",
    "logs/*",
    "*.tmp",
    "*.tmp/*",
    "non_finite_*",
    "encoded/*",
    ".*",
    "*/.*",
    "*__pycache__*",
]
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Of an earlier model, these would be loaded in the place of the new one's, or beside them.
REPLACED = (".safetensors", ".safetensors.index.json", ".py")
NEW_REPO = {".gitattributes", "README.md"}


def list_files(folder: str | Path) -> list[str]:
    """Lists the files of a folder that are published.

    Args:
        folder (`str` or `Path`): Of a model.

    Returns:
        `list[str]`: paths inside it, sorted.

    Raises:
        ValueError: If there is no such folder, or it holds pickled weights, which run code where they are loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder. Give one that holds a model.")
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    files = list(filter_repo_objects(paths, ignore_patterns=NOT_UPLOADED))
    if pickled := [name for name in files if name.endswith(PICKLED)]:
        raise ValueError(
            f"{str(folder)!r} holds pickled files, which can run code where they are loaded: {', '.join(pickled)}. "
            "Convert them, if you trust them: `safetensors.torch.save_file(torch.load(old, weights_only=True), "
            '"model.safetensors", metadata={"format": "pt"})`, and delete them.'
        )
    return files


def check_target(
    api: HfApi, repo_id: str, *, private: bool = False, revision: str | None = None, overwrite: bool = False
) -> ModelInfo | None:
    """Looks at the repo that is to be written to, and refuses it where writing would be a mistake.

    Args:
        api (`HfApi`): With the token.
        repo_id (`str`): Hub repo.
        private (`bool`, defaults to `False`): Whether it is to be private.
        revision (`str`, *optional*): Branch; a missing one will begin as the main one is.
        overwrite (`bool`, defaults to `False`): Whether it may hold something else.

    Returns:
        `ModelInfo`, or None where there is no such repo.

    Raises:
        ValueError: If it holds something that hf_mm did not publish, or is public where it is to be private.
        ConnectionError: If the Hub is not reached.
        PermissionError: If the token is wrong.
    """
    with hub_errors(api, repo_id):
        try:
            try:
                info = api.model_info(repo_id, revision=revision)
            except RevisionNotFoundError:
                info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return None
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public. Make it private in its settings on the Hub, or publish elsewhere."
        )
    files = {sibling.rfilename for sibling in info.siblings or []}
    if not overwrite and files - NEW_REPO and LIBRARY not in (info.tags or []):
        raise ValueError(
            f"{repo_id} exists and holds something else: its card does not name {LIBRARY}. Publish under another "
            "name, or with `overwrite` to replace the files of the same names."
        )
    return info


def upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    commit_message: str = "Upload model",
) -> str:
    """Uploads a folder as one commit, so that there is never half a model; weights and code of before are removed.

    Not `upload_folder` of huggingface_hub, which makes several commits of a folder that takes long. Like it, this
    sends large files first, and leaves out those that are there already, be it from a call that was cut.

    Args:
        api (`HfApi`): With the token.
        folder (`Path`): Of a model.
        repo_id (`str`): Hub repo; made if missing.
        private (`bool`, defaults to `False`): Whether a new repo is private.
        revision (`str`, *optional*): Branch, made if missing; none: the main one.
        overwrite (`bool`, defaults to `False`): Whether to write into a repo that holds something else.
        commit_message (`str`, defaults to `"Upload model"`): First line of the commit.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: As `check_target`.
        ConnectionError: If the Hub is lost on the way.
        PermissionError: If the token is missing, wrong, or may not write.
    """
    files = list_files(folder)
    target = {"private": private, "revision": revision, "overwrite": overwrite}
    check_target(api, repo_id, **target)  # type: ignore[arg-type]
    with hub_errors(api, repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = check_target(api, repo_id, **target)  # type: ignore[arg-type]
    there = [] if info is None else [sibling.rfilename for sibling in info.siblings or []]
    stale = [name for name in there if name.endswith(REPLACED) and name not in files]
    with hub_errors(api, repo_id):
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            revision=revision,
            parent_commit=None if info is None else info.sha,
        )
    return str(commit.commit_url)


@contextmanager
def hub_errors(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turns the errors of the Hub and of the way to it into one line that says what to do.

    Args:
        api (`HfApi`): Whose Hub it is.
        repo_id (`str`): That was asked for.

    Raises:
        ValueError: If the Hub does not take the card.
        ConnectionError: If the Hub is not reached, is in trouble, or is lost.
        PermissionError: If there is no token, a wrong one, or one that may not write.
        OSError: If the Hub refuses for another reason.
    """
    again = "The same call goes on where this one stopped."
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError("The Hub is switched off: unset HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        raise _explain(error, api, repo_id, again) from error
    except ValueError as error:  # of a card
        raise ValueError(" ".join(str(error).split())) from error
    except (HTTPError, RuntimeError) as error:  # the latter around the former, or from the library that sends chunks
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            raise _explain(cause, api, repo_id, again) from error
        told = " ".join(str(cause).split())
        raise ConnectionError(f"The Hub at {api.endpoint} is not reached, or was lost ({told}). {again}") from error


def _explain(error: HfHubHTTPError, api: HfApi, repo_id: str, again: str) -> OSError:
    """Says what an answer of the Hub means."""
    status = error.response.status_code
    if status in (401, 404):
        return PermissionError(
            f"The Hub at {api.endpoint} wants another token for {repo_id}. Log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write."
        )
    if status == 403:
        return PermissionError(f"The token may not write to {repo_id}. Give a token that may, or another `repo_id`.")
    if status == 412:
        return OSError(f"Somebody else wrote to {repo_id} meanwhile. Look at it, then publish again.")
    if status >= 500:
        return ConnectionError(f"The Hub at {api.endpoint} is in trouble (status {status}). {again}")
    return OSError(f"The Hub at {api.endpoint} refuses {repo_id}: {' '.join(str(error).split())}")
