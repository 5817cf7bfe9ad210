"""Which command a recipe file is for, and how it is run: by accelerate's launcher, in a process of its own.

A recipe opens with comments, and the last `accelerate launch` among them that takes a `--config` is its command: it
names the script and how it is launched. Recipes are part of the repository and of the source distribution, not of the
wheel, so scripts are looked for beside the recipe and from the working directory.
"""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


COMMAND = re.compile(r"accelerate launch (?P<flags>.*?)(?P<script>recipes/\w+\.py) .*--config ")


def read_command(recipe: Path) -> tuple[list[str], str]:
    """Reads how a recipe is launched from the comments that it opens with.

    Args:
        recipe (`Path`): The file.

    Returns:
        `tuple[list[str], str]`: flags of the launcher, and the script, such as `recipes/pretrain.py`.

    Raises:
        ValueError: If the file cannot be read, or they hold no such command.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} is no recipe that can be read: {error}. Give the path of a YAML file.") from error
    found = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        found = COMMAND.search(line) or found
    if found is None:
        raise ValueError(
            f"{recipe} does not say which script it is for. Begin it with a comment such as "
            "'# accelerate launch recipes/pretrain.py --config <this file>'."
        )
    return shlex.split(found["flags"]), found["script"]


def find_beside(recipe: Path, name: str) -> Path | None:
    """Finds a file of the repository: in a folder that the recipe lies in, or in the working directory."""
    folders = [*recipe.resolve().parents, Path.cwd()]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def launch_command(recipe: Path, overrides: Sequence[str] = (), accelerate_config: Path | None = None) -> list[str]:
    """Builds the command that trains by a recipe.

    Args:
        recipe (`Path`): The file.
        overrides (`Sequence[str]`): Fields to set otherwise: `["--learning_rate", "1e-4"]`.
        accelerate_config (`Path`, *optional*): Hardware, in the place of the flags that the recipe names.

    Returns:
        `list[str]`: the command.

    Raises:
        ValueError: If the recipe names no script, or the script or a file it is launched with is not here.
    """
    flags, script = read_command(recipe)
    if accelerate_config is not None:
        flags = ["--config_file", str(accelerate_config)]
    path = find_beside(recipe, script)
    if path is None:
        raise ValueError(
            f"{script}, which {recipe} is for, is not here. Recipes are in the repository and in the source "
            "distribution, not in the installed package: run this in a folder that has recipes/."
        )
    flags = [str(find_beside(recipe, flag) or flag) if flag.startswith("recipes/") else flag for flag in flags]
    # quiet: a training that fails says why itself, and the launcher adds no traceback of its own
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    return [*launcher, *flags, str(path), "--config", str(recipe), *overrides]


def launch(command: Sequence[str]) -> int:
    """Runs a command to its end.

    An interrupt from the terminal reaches it too, which ends by itself, having saved what it saves.

    Args:
        command (`Sequence[str]`): From [`launch_command`].

    Returns:
        `int`: its exit code; 128 and the number of the signal that ended it, as in a shell.
    """
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code
