"""Uploads what training has come to while it goes on, one upload at a time, and the finished model at the end."""

import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi

from hf_mm.hub import complete_repo, publish
from hf_mm.hub_upload import check_target, upload
from hf_mm.training.recipe import TrainingRecipe


PUSHED = "pushed.tmp"


class HubPush:
    """Keeps a Hub repo up to date with a run; does nothing without `push_to_hub`.

    What would be refused at the end, such as a wrong token or a repo with something else, is refused at the start. On
    the way a lost Hub only warns: the next save tries again. What is uploaded then was not loaded without hf_mm, which
    takes long; the finished model is, before it is published.

    Args:
        accelerator (`Accelerator`): Of the run.
        recipe (`TrainingRecipe`): With the folder, the Hub repo, and how often to save.

    Raises:
        ValueError: If the repo holds something else.
        OSError: If the Hub is not reached, or the token wrong.
    """

    def __init__(self, accelerator: Accelerator, recipe: TrainingRecipe) -> None:
        self.accelerator, self.recipe = accelerator, recipe
        self.folder = Path(recipe.output_dir) / PUSHED
        self.api, self._sender = HfApi(), threading.Thread()
        self._target = {"private": recipe.hub_private_repo, "revision": recipe.hub_revision}
        if recipe.push_to_hub is not None and accelerator.is_main_process:
            check_target(self.api, recipe.push_to_hub, **self._target)

    def every(self, export: Callable[[Path], Any]) -> tuple[int | None, Callable[[int], None]]:
        """How often the training loop is to upload, and by what.

        Args:
            export (`Callable[[Path], Any]`): Writes the model as it stands into a folder; called by all processes.
        """
        return (None if self.recipe.push_to_hub is None else self.recipe.save_steps), partial(self._push, export)

    def _push(self, export: Callable[[Path], Any], step: int) -> None:
        """Exports the model and begins to upload it, unless an upload still runs; to be called by all processes."""
        (is_sending,) = broadcast_object_list([self._sender.is_alive()])
        if is_sending or step == self.recipe.max_steps:  # the finished model follows
            return
        try:
            export(self.folder)
        except OSError as error:  # such as a full disk
            print(f"\nStep {step} is not exported to be uploaded; the next save tries again. {error}")
            return
        if self.accelerator.is_main_process:
            # A daemon: a Hub that does not answer must not keep a stopped run from ending.
            self._sender = threading.Thread(target=self._send, args=(step,), daemon=True)
            self._sender.start()

    def _send(self, step: int) -> None:
        """Uploads what was exported, and warns where that fails."""
        try:
            complete_repo(self.folder, self_contained=True)
            message = f"Step {step} of {self.recipe.max_steps}"
            address = upload(self.api, self.folder, self.recipe.push_to_hub, commit_message=message, **self._target)
            print(f"\nStep {step} is uploaded: {address}")
        except (OSError, ValueError) as error:
            print(f"\nStep {step} is not uploaded; the next save tries again. {error}")

    def finish(self) -> str | None:
        """Waits for an upload that runs, publishes the finished model, and says where; for the main process.

        Raises:
            SystemExit: If that fails, with the command that tries again: the model is saved.
        """
        if self.recipe.push_to_hub is None:
            return None
        if self._sender.is_alive():
            self._sender.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            return publish(self.recipe.output_dir, self.recipe.push_to_hub, **self._target)
        except (OSError, ValueError, RuntimeError) as error:
            again = f"--model_name_or_path {self.recipe.output_dir} --repo_id {self.recipe.push_to_hub}"
            raise SystemExit(f"Not published: {error} Try again with `python recipes/publish.py {again}`.") from error
