"""A Space as the Hub runs it: what it asks for installed from a package index, its script started, a picture drawn.

Slow: builds a wheel of the package, for which pip fetches the build backend. The index is a folder served on loopback, and the
packages that the wheel depends on are those of the environment.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hf_mm
from hf_mm.hub_upload import list_files


pytest.importorskip("gradio", reason='the demo needs Gradio: pip install -e ".[demo]"')
from hf_mm.demo.space import write_space  # noqa: E402


pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[2]

ASKED = """
import json, sys
import app, hf_mm
from gradio_client import Client

_, address, _ = app.demo.launch(prevent_thread_lock=True, quiet=True)
pictures, status, _ = Client(address, verbose=False).predict("a red star", 5, 1, 3.0, 3, 0, api_name="/draw")
print(json.dumps({"package": hf_mm.__file__, "status": status, "pictures": len(pictures)}))
"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serve_index(folder):
    """Serves a folder of a folder per package, whose listings are what pip reads of an index."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("given", ["what ships", "a folder"])
def test_a_space_draws_with_the_package_that_an_index_holds(tmp_path, given):
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "index" / "hf-mm", SOURCE)
    model = None
    if given == "a folder":
        model = str(shutil.copytree(hf_mm.DEFAULT_CHECKPOINT, tmp_path / "mine"))
    space = tmp_path / "space"
    write_space(space, model, [], False, list_files)
    asked = ["--target", tmp_path / "installed", "--requirement", space / "requirements.txt"]
    with serve_index(tmp_path / "index") as index:
        run(*pip, "install", "--quiet", "--no-deps", "--no-cache-dir", "--index-url", index, *asked)
    paths = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    seen = json.loads(run(sys.executable, "-c", ASKED, cwd=space, env=paths).splitlines()[-1])
    assert Path(seen["package"]).is_relative_to(tmp_path / "installed")
    assert seen["status"] == "Done. Seed: 5" and seen["pictures"] == 1
