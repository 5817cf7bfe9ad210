import json
import subprocess
import sys


HEAVY = {"torch", "transformers", "diffusers"}


def run(*words: str) -> subprocess.CompletedProcess:
    code = (
        "import json, sys, hf_mm_command\n"
        f"sys.argv = ['hf-mm', *{words!r}]\n"
        "try:\n"
        "    hf_mm_command.main()\n"
        "finally:\n"
        f"    print(json.dumps(sorted({HEAVY} & sys.modules.keys())), file=sys.stderr)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_help_and_wrong_usage_load_no_heavy_library() -> None:
    for words, code in ((["--help"], 0), (["generate", "--help"], 0), (["generate", "kite", "--height", "x"], 2)):
        done = run(*words)
        assert done.returncode == code, done.stderr
        assert done.stderr.splitlines()[-1] == "[]"
        assert "Usage: hf-mm" in done.stdout + done.stderr


def test_commands_find_the_package() -> None:
    done = run("caption", "nowhere.png")
    assert done.returncode == 1 and "nowhere.png" in done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == sorted(HEAVY)
