"""What runs where none of the extras of pyproject.toml is installed."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Named for what they cannot do without; they end at the import with the name of what is missing.
NEEDS_INDEX = {"build_retrieval_index", "evaluate_retrieval", "show_retrieval"}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem not in NEEDS_INDEX)
# Each finder of modules is asked as before, but for names of the extras, which none finds.
WITHOUT_EXTRAS = """
import importlib, sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        hidden = {"faiss", "fontawesomefree", "gradio", "skimage", "playwright", "torchmetrics", "torch_fidelity", "lm_eval", "pycocoevalcap"}
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, *args)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
sys.path.insert(0, "recipes")
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, error)
"""


def test_imports_without_extras() -> None:
    names = ["hf_mm", "hf_mm.cli", "hf_mm.chat", "hf_mm.hub", *RECIPES, "build_retrieval_index"]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *names]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "build_retrieval_index No module named 'faiss'\n"
