"""The command that kills the recipes: what it counts is true, and what is killed ends as if it were not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_killed_recipes_leave_what_undisturbed_ones_leave(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--kills=16", "--seed=3"]
    command += ["--kills_per_run=4", f"--output={tmp_path / 'faults.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "faults.json").read_text())["counts"]
    assert counts.keys() == {"train", "encode", "index", "publish"}
    assert sum(count["num_kills"] for count in counts.values()) == 16
    assert all(count["num_runs"] and not count["faults"] for count in counts.values())


AT_ONCE = """
import sys, time
from pathlib import Path
from faults import fork, wait
for number in range(20):
    assert wait(fork(lambda: time.sleep(60), Path(sys.argv[1], "work")), seconds=0) is None
"""


def test_what_has_hardly_begun_is_killed_too(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
