import ast
import inspect
import shutil

import pytest
from huggingface_hub import RepoCard

import hf_mm
from hf_mm.cli import build_demo
from hf_mm.hub_upload import list_files


gradio = pytest.importorskip("gradio", reason='a Space names the version of Gradio: pip install -e ".[demo]"')
from hf_mm.demo.space import write_space  # noqa: E402


def call_of(folder):
    """The arguments that app.py builds its page with."""
    calls = [node for node in ast.walk(ast.parse((folder / "app.py").read_text())) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "build_demo"]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def test_a_space_names_its_model_and_what_it_needs(tmp_path):
    folder = tmp_path / "new" / "space"
    write_space(folder, "me/my-model", ['a "red" fox'], True, list_files)
    assert call_of(folder) == {"model": "me/my-model", "examples": ['a "red" fox'], "trust_remote_code": True}
    assert call_of(folder).keys() <= inspect.signature(build_demo).parameters.keys()
    assert (folder / "requirements.txt").read_text() == f"hf_mm[demo]=={hf_mm.__version__}\n"
    facts = RepoCard.load(folder / "README.md").data.to_dict()
    assert facts["sdk"] == "gradio" and facts["app_file"] == "app.py" and facts["models"] == ["me/my-model"]
    assert facts["sdk_version"] == gradio.__version__ and facts["title"] == "my-model"


def test_a_folder_of_a_model_is_copied_without_what_its_training_left(tmp_path):
    model = tmp_path / "runs" / "mine"
    shutil.copytree(hf_mm.DEFAULT_CHECKPOINT, model)
    for name in ("checkpoint-7/model.safetensors", "logs/a.tfevents", "encoded/rows.arrow"):
        (model / name).parent.mkdir()
        (model / name).write_text("large")
    write_space(tmp_path / "space", str(model), [], False, list_files)
    copied = {str(path.relative_to(tmp_path / "space/model")) for path in (tmp_path / "space/model").rglob("*.*")}
    assert {"model.safetensors", "scheduler/scheduler_config.json", "tokenizer.json"} <= copied
    assert not [name for name in copied if name.startswith(("checkpoint-", "logs", "encoded"))]
    assert call_of(tmp_path / "space") == {"model": "model"}


def test_a_space_of_the_checkpoint_that_ships_needs_no_argument(tmp_path):
    write_space(tmp_path, None, [], False, list_files)
    assert call_of(tmp_path) == {}


def test_what_is_there_is_not_overwritten_and_a_folder_without_a_pipeline_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_space(tmp_path, None, [], False, list_files)
    (tmp_path / "clip").mkdir()
    with pytest.raises(ValueError, match="no model_index.json"):
        write_space(tmp_path / "new", str(tmp_path / "clip"), [], False, list_files)
    assert not (tmp_path / "new").exists()
    shutil.copytree(hf_mm.DEFAULT_CHECKPOINT, tmp_path / "old")
    (tmp_path / "old" / "model.bin").write_text("pickled")
    with pytest.raises(ValueError, match="holds pickled files"):
        write_space(tmp_path / "new", str(tmp_path / "old"), [], False, list_files)
    assert not (tmp_path / "new").exists()
