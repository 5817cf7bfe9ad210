"""A published repo is an ordinary one: olah, an independent implementation of the Hub, serves it from git."""

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from hf_mm.hub import complete_repo, stage_folder


OLAH = shutil.which("olah-cli")
FILES_AND_LOGITS = """
import os
import sys

sys.modules["hf_mm"] = None  # whatever imports it fails
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForMultimodalLM

# Whole, for to olah a file that a repo lacks, such as the adapter that is looked for, is a repo that is not there.
folder = snapshot_download("me/model")
print(sorted(os.listdir(folder)))
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    print(model(input_ids=torch.tensor([[7, 11, 13]])).logits.double().sum().item())
"""


@pytest.fixture
def serve_repos(tmp_path):
    """Starts olah over a folder of git repos; returns its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"host": "127.0.0.1", "port": port, "repos-path": str(tmp_path / "cached")}
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    config = tmp_path / "olah.toml"
    offline = "[accessibility]\noffline = true"  # else it asks the Hub first whether there is such a repo
    config.write_text("\n".join(["[basic]", *lines, f"mirrors-path = [{str(tmp_path / 'mirrors')!r}]", offline]))
    command = [OLAH, "--config", config, "--log-path", tmp_path / "logs"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=5)
            break
        except urllib.error.HTTPError:
            break  # it answers
        except OSError:
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait()


@pytest.mark.slow
@pytest.mark.skipif(OLAH is None, reason="olah-cli is not on the PATH; pip install olah, in an environment of its own")
def test_olah_serves_a_published_repo(make_folder, ask_process, serve_repos, tmp_path):
    repo = tmp_path / "mirrors" / "models" / "me" / "model"
    stage_folder(make_folder("transfusion"), repo)
    complete_repo(repo, self_contained=True)
    (repo / "model.safetensors").unlink()  # a link, which git would take for one
    shutil.copyfile(tmp_path / "repo" / "model.safetensors", repo / "model.safetensors")
    for words in (["init", "-b", "main"], ["add", "-A"], ["commit", "-m", "Upload model"]):
        identity = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
        subprocess.run(["git", *identity, *words], cwd=repo, check=True, capture_output=True)

    served = ask_process(FILES_AND_LOGITS, HF_ENDPOINT=serve_repos).splitlines()
    assert "model.safetensors" in served[0] and "modeling_transfusion.py" in served[0]
    model = AutoModelForMultimodalLM.from_pretrained(repo).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[7, 11, 13]])).logits.double().sum().item()
    assert float(served[1]) == expected
