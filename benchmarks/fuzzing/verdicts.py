"""Runs one input and judges it: taken, refused as documented, or a finding.

Documented are a `ValueError`, `TypeError` or `OSError` that somebody wrote down: raised by a `raise` statement of this
repository, or of a library of the ecosystem at its own door, with a message. What merely happened, such as an
`IndexError`, or a `TypeError` of an addition, is a finding, and so are hangs and inputs that take too much memory.
"""

import io
import linecache
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

from huggingface_hub.errors import StrictDataclassError


ROOT = Path(__file__).parents[2]
OWN = (str(ROOT / "src" / "hf_mm"), str(ROOT / "recipes"))
LIBRARIES = tuple(f"/site-packages/{name}/" for name in ("transformers", "diffusers", "huggingface_hub", "datasets"))
SHORTEST_MESSAGE = 15
KIB = 1024


class InputTimeout(BaseException):
    """An input took too long; no `except Exception` on the way takes it for its own."""


@dataclass(frozen=True)
class Verdict:
    """What came of an input.

    Args:
        outcome (`str`): `"taken"`, `"refused"`, `"finding"`, or `"outside"`: what a library's own door made of it,
            such as an `AutoProcessor`, before this package was asked.
        door (`str`): What the input was given to.
        shown (`str`): The input, cut.
        seconds (`float`): Processor time that it took.
        error (`str`): Type and message of the error, cut.
        place (`str`): Line that raised it, and the last of this repository on the way there.
        trace (`str`): The whole traceback.
    """

    outcome: str
    door: str
    shown: str
    seconds: float
    error: str = ""
    place: str = ""
    trace: str = ""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises [`InputTimeout`] where the body takes more of the processor's time, whatever else the machine does."""

    def stop(*_: Any) -> None:
        raise InputTimeout(f"no end after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory(gib: float) -> None:
    """Makes allocations fail beyond what the process has mapped now and some GiB more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def is_documented(error: BaseException) -> bool:
    """Tells an error that a door wrote down from one that merely happened."""
    if isinstance(error, SystemExit):
        return error.code == 2  # argparse, which has printed why
    if isinstance(error, StrictDataclassError):
        return True  # the library's check of a configuration names field and value
    if not isinstance(error, (ValueError, TypeError, OSError)) or len(str(error)) < SHORTEST_MESSAGE:
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file = frame.f_code.co_filename
    is_written = linecache.getline(file, line).strip().startswith("raise")
    return is_written and (file.startswith(OWN) or any(library in file for library in LIBRARIES))


def reaches_package(error: BaseException) -> bool:
    """Tells whether an error came through this repository, or a hang or a fault of the fuzzer did."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_library = any(library in file for library in LIBRARIES for file in files)
    return not in_library or any(file.startswith(OWN) for file in files)


def describe_place(error: BaseException) -> str:
    """Names the line that raised an error, and the last line of this repository on the way there."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if file.startswith(OWN)]
    named = dict.fromkeys([*own[-1:], *frames[-1:]])
    return " <- ".join("/".join(Path(file).parts[-2:]) + f":{line}" for file, line in named)


def run_input(
    door: str, call: Callable[[], Any], shown: str, max_seconds: float, max_growth_mib: float = 1024
) -> Verdict:
    """Gives an input to its door and judges what comes of it.

    Args:
        door (`str`): Name of the door.
        call (`Callable`): Gives it.
        shown (`str`): The input as text.
        max_seconds (`float`): Beyond this it hangs.
        max_growth_mib (`float`): By how much more it may raise the most memory that the process ever had.
    """
    start, before = process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            with time_limit(max_seconds):
                call()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        message = f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()[:500]
        trace = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
        outcome = "refused" if is_documented(error) else "finding" if reaches_package(error) else "outside"
        return Verdict(outcome, door, shown, process_time() - start, message, describe_place(error), trace)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / KIB
    if growth > max_growth_mib:
        return Verdict("finding", door, shown, process_time() - start, f"memory: {growth:.0f} MiB more", door)
    return Verdict("taken", door, shown, process_time() - start)
