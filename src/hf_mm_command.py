"""Where the command `hf-mm` starts: outside the package, whose import loads torch, transformers and diffusers.

Help and wrong usage need none of them, so `hf_mm.cli` is loaded here without the package around it; its commands
import what they use, and the package with it.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Runs the command."""
    spec = importlib.util.spec_from_file_location("hf_mm.cli", Path(__file__).parent / "hf_mm" / "cli.py")
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    cli = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    cli.app()
