"""What loading a CM3Leon checkpoint says about damaged files: which checkpoint, and what to do, as an `OSError`.

Libraries raise nearly every type on files that are cut off, changed or mixed up. Leaf file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError


@contextmanager
def refuse_damaged(name: Any) -> Iterator[None]:
    """Names the checkpoint in what libraries raise about damaged files.

    Args:
        name (`str` or `os.PathLike`): The checkpoint.

    Raises:
        OSError: In place of an error that does not say what it is about, such as a `KeyError`.
    """
    try:
        yield
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{str(name)!r} has a file that is no JSON or no text: {error}. Get it anew.") from error
    except OSError as error:
        if type(error) not in (FileNotFoundError, IsADirectoryError):  # of the system, not of a library
            raise
        raise OSError(f"{str(name)!r} lacks a file that belongs to it: {error}. Get it anew.") from error
    except (ValueError, ImportError, MemoryError, torch.OutOfMemoryError, StrictDataclassError):
        raise  # which say what is wrong
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise OSError(f"{str(name)!r} cannot be loaded: {error}") from error
        raise OSError(
            f"{str(name)!r} has weights of other shapes than its config.json says; the report above lists them. "
            "Get both anew, or see whether the configuration was changed."
        ) from error
    except Exception as error:
        raise OSError(
            f"{str(name)!r} cannot be loaded ({type(error).__name__}: {error}). Its files are damaged or do not "
            "belong together: get them anew."
        ) from error


@contextmanager
def refuse_unbuildable(field: str) -> Iterator[None]:
    """Names the field of a configuration from which a part of the model cannot be built.

    Args:
        field (`str`): Its name.

    Raises:
        ValueError: In place of whatever building the part raises.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"`{field}` describes nothing that can be built ({type(error).__name__}: {error}). Take it from a "
            "model that works."
        ) from error
