import os
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from hub_server import TOKEN, HubServer

from hf_mm import CM3LeonPipeline, TransfusionPipeline
from hf_mm.hub import write_code


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback that this process and those it starts talk to, with a token that may write."""
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
        yield server


@pytest.fixture
def ask_process(hub, tmp_path):
    """Runs Python code in a process of its own that talks to the Hub, with an empty cache; returns what it prints."""

    def ask(code, *arguments, token=TOKEN, fails=False, **variables):
        environment = {**os.environ, **hub.environment(tmp_path / "home", token), "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert bool(done.returncode) == fails, done.stderr[-3000:]
        return done.stderr if fails else done.stdout

    return ask


@pytest.fixture
def make_pipeline(make_model, make_processor, make_cm3leon, make_cm3leon_processor, tiny_vq):
    def make(family):
        if family == "transfusion":
            model = make_model(patch_positions="rotary", patch_layer="unet")
            return TransfusionPipeline(model, make_processor(model.config), model.default_scheduler())
        model = make_cm3leon(vq_config=tiny_vq)
        return CM3LeonPipeline(model, make_cm3leon_processor(model.config))

    return make


@pytest.fixture
def make_folder(make_pipeline, tmp_path):
    """Saved pipelines with their code."""

    def make(family, name="repo"):
        pipe = make_pipeline(family)
        pipe.save_pretrained(tmp_path / name)
        write_code(pipe, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(params=["transfusion", "cm3leon"])
def folder(request, make_folder):
    return make_folder(request.param)


@pytest.fixture
def not_checked(monkeypatch):
    """Publishes without starting a process that loads the folder, which takes long and has tests of its own."""
    monkeypatch.setattr("hf_mm.hub.check_cold_load", lambda folder: None)


@pytest.fixture(autouse=True)
def same_threads():
    assert torch.get_num_threads() == 1
