"""Logs to the trackers of a run, which may be lost without harm to it: `history.jsonl` has the same numbers.

Knows accelerate's trackers. Does not know what is measured.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from accelerate import Accelerator, PartialState

from .recipe import end_processes


logger = logging.getLogger(__name__)


def start_trackers(accelerator: Accelerator, fields: Mapping[str, Any]) -> None:
    """Starts the trackers of a run, once nothing can refuse it any more: a refused one leaves no folder behind.

    Args:
        accelerator (`Accelerator`): From `build_accelerator`.
        fields (`Mapping[str, Any]`): Of the recipe, shown beside the curves.

    """
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in fields.items()}
    accelerator.init_trackers("logs", config=plain)  # trackers take no lists and no None


def log_to_trackers(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Logs values to every tracker; one that fails costs a warning, and is tried again the next time.

    Args:
        accelerator (`Accelerator`): From `build_accelerator`.
        values (`Mapping[str, float]`): By names such as `train/loss`.
        step (`int`): The step that they belong to.

    """
    for tracker in accelerator.trackers:
        _attempt(tracker, f"did not take the values of step {step}", partial(tracker.log, values, step=step))


def end_training(accelerator: Accelerator) -> None:
    """Closes the trackers, whatever state they are in, and ends the group of processes.

    Args:
        accelerator (`Accelerator`): From `build_accelerator`.

    """
    for tracker in accelerator.trackers:
        _attempt(tracker, "could not be closed", tracker.finish)
    accelerator.trackers.clear()
    end_processes(PartialState())


def _attempt(tracker: Any, fault: str, action: Callable[[], Any]) -> None:
    try:
        action()
    except Exception as error:  # of any kind: trackers are other people's, and talk to disks and servers
        logger.warning(f"The tracker {tracker.name!r} {fault}: {error!r}. What was measured is in history.jsonl.")
