"""Where the command `hf-mm` starts: outside the package, whose import loads torch, transformers and diffusers.

Help and wrong usage need none of them, so `hf_mm.cli` is loaded here, with the examples of its help, without the
package around it; its commands import what they use, and the package with it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Runs the command."""
    load("cli_examples")
    load("cli").app()


def load(name: str) -> ModuleType:
    """Loads a module of the package by itself."""
    spec = importlib.util.spec_from_file_location(f"hf_mm.{name}", Path(__file__).parent / "hf_mm" / f"{name}.py")
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
