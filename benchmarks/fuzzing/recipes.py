"""Recipe files and flags, changed, for the parsing and the checks of the recipes; nothing is trained."""

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from random import Random
from typing import Any

import yaml

from hf_mm.data.cm3_masking import CM3Masking
from hf_mm.recipe_launch import launch_command
from hf_mm.training.recipe import parse_recipe, resolve_mixed_precision

from .values import NUMBERS, damage, mutate, odd_text, odd_value


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
# Of each script the dataclasses it reads, and the pattern of its files.
SCRIPTS = {
    "pretrain": (("ARGUMENTS",), "*_pretrain.yaml"),
    "sft": (("ARGUMENTS",), "*_sft.yaml"),
    "train_clip": (("ARGUMENTS",), "clip_*.yaml"),
    "train_image_tokenizer": (
        ("ImageTokenizerArguments", "DatasetArguments", "CaptionArguments", "TrainingRecipe"),
        "v*_*px.yaml",
    ),
    "encode_images": (("EncodeArguments", "DatasetArguments", "CaptionArguments"), ""),
    "train_text_tokenizer": (("TextTokenizerArguments", "DatasetArguments"), ""),
    "reproduce": (("GridArguments",), "reproductions/*.yaml"),
    "sample": (("SampleArguments",), ""),
    "publish": (("PublishArguments",), ""),
}
WORDS = (
    "none", "auto", "true", "yes", "0", "1", "-1", "3e-4", "nan", "inf", "-inf", "1e400", "0x10", "1_000", "٣",
    "", " ", "[1, 2]", "{}", "a=b", "patch_size=4", "hidden_size=0", "num_hidden_layers=-1", "text_config={}",
    "patch_layer=unet", "image_size=None", "patch_size", "=", ",", "model_type=x", "vocab_size=1e99", "0.16B",
    "7B", "350M", "cm3leon", "llama", "transfusion", "edit@icon_scenes:shapes", "vqa", "@", "chat@",
    "train[:10%]", "icon_scenes:shapes", "/dev/null", "(", "(?P<a", "name: words", ": ", "a: b > c", "steps=1",
)  # fmt: skip
# A list of lists of lists that are the same: small as a file, and without end as text.
BOMB = "[&a [x, x], " + ", ".join(f"&{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]" for n in range(9)) + "]"
FILES = (
    "", "null", "[]", "3", "text", "a: b: c", "\tx: 1", "x: 1\nx: 2", "? [1, 2]\n: 3", "1: 2\nnull: 3\ntrue: 1",
    "!!python/object/apply:os.system ['true']", "&a [*a]", "x: &a {y: *a}", "x: 2020-13-45", "x: 0o9",
    "%YAML 9.9", "---\na: 1\n---\nb: 2", "learning_rate: &a [*a]", "[" * 900, "{a: " * 900,
    "seed: " + "9" * 5000, "max_steps: 1e400", "learning_rate: .nan", "learning_rate: 1:30", f"x: {BOMB}",
    f"report_to: {BOMB}", f"seed: {BOMB}", BOMB,
)  # fmt: skip


class RecipeInputs:
    """Draws recipe files and flags and the script that reads them.

    Args:
        folder (`Path`): For files.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recipe.yaml"
        self.model_path = folder / "model.json"
        self.modules = {name: importlib.import_module(name) for name in SCRIPTS}
        self.building = importlib.import_module("building")
        self.models = sorted((CONFIGS / "models").glob("*.json"))
        self.kinds: dict[str, list[type]] = {}
        for name, (types, _) in SCRIPTS.items():
            found = [vars(self.modules[name])[kind] for kind in types]
            self.kinds[name] = list(found[0]) if types == ("ARGUMENTS",) else found

    def draw(self, rng: Random) -> tuple[str, Callable[[], Any], str]:
        """Returns the name of a door, a call of it, and the input as text."""
        if rng.random() < 0.1:
            return self._draw_launch(rng)
        if rng.random() < 0.15:
            return self._draw_model(rng)
        script = rng.choice(list(SCRIPTS))
        argv = self._flags(script, rng)
        if rng.random() < 0.8:
            self._write(script, rng)
            argv = ["--config", str(self.path), *argv] if rng.random() < 0.98 else [*argv, "--config"]
        text = self.path.read_bytes()[:1500] if "--config" in argv else b""
        return script, lambda: self._read(script, argv), f"{argv} {text!r}"

    def _read(self, script: str, argv: list[str]) -> None:
        """Reads a recipe, and checks what its script checks before it opens rows."""
        parsed = parse_recipe(*self.kinds[script], argv=argv)
        named = {type(part).__name__: part for part in parsed}
        if "ModelArguments" in named:
            config = self.building.load_config(named["ModelArguments"])
            if config.model_type == "cm3leon":
                spans = asdict(named["SpanArguments"].for_objective(config.objective))
                names = [item.name for item in fields(CM3Masking) if item.name not in spans]
                CM3Masking(**spans, **{name: getattr(config, name) for name in names})
        if script == "train_clip":
            self.modules[script].load_clip_config(named["ClipArguments"])
        if "TrainingRecipe" in named:
            resolve_mixed_precision(named["TrainingRecipe"].mixed_precision, "cpu")

    def _flags(self, script: str, rng: Random) -> list[str]:
        """Draws flags of a script, known and unknown, with values of any kind."""
        names = [item.name for kind in self.kinds[script] for item in fields(kind)]
        argv = []
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            name = rng.choice(names) if rng.random() < 0.9 else odd_text(rng, 30)
            values = [self._word(rng) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
            argv += [f"--{name}={values[0]}"] if values and rng.random() < 0.3 else [f"--{name}", *values]
        return argv

    def _word(self, rng: Random) -> str:
        kind = rng.random()
        return rng.choice(WORDS) if kind < 0.6 else str(rng.choice(NUMBERS)) if kind < 0.8 else odd_text(rng, 60)

    def _write(self, script: str, rng: Random) -> None:
        """Writes a recipe: one of the repository, its values, keys or bytes changed, or something else."""
        files = sorted(CONFIGS.glob(SCRIPTS[script][1])) if SCRIPTS[script][1] else []
        text = rng.choice(files).read_bytes() if files else b"output_dir: runs/x\n"
        kind = rng.random()
        if kind < 0.15:
            text = rng.choice(FILES).encode()
        elif kind < 0.35:
            text = damage(text, rng)
        else:
            recipe = yaml.safe_load(text)
            names = [item.name for part in self.kinds[script] for item in fields(part)]
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                value = rng.choice((self._word(rng), odd_value(rng), rng.choice(NUMBERS)))
                recipe[rng.choice(names) if rng.random() < 0.9 else odd_text(rng, 30)] = value
            text = yaml.safe_dump(recipe, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        self.path.write_bytes(text)

    def _draw_model(self, rng: Random) -> tuple[str, Callable[[], Any], str]:
        """Draws the configuration file of a new model, and changes to it."""
        config = json.loads(rng.choice(self.models).read_text(encoding="utf-8"))
        config = mutate(config, rng) if rng.random() < 0.9 else odd_value(rng)
        text = json.dumps(config, default=str).encode("utf-8", "surrogatepass")
        self.model_path.write_bytes(damage(text, rng) if rng.random() < 0.2 else text)
        argv = ["--config_name", str(self.model_path)]
        if rng.random() < 0.3:
            argv += ["--config_overrides", rng.choice((self._word(rng), ",".join(self._word(rng) for _ in range(2))))]
        (arguments,) = parse_recipe(self.building.ModelArguments, argv=argv[:2])
        arguments.config_overrides = argv[3] if len(argv) > 2 else None
        return "load_config", lambda: self.building.load_config(arguments), f"{argv} {text[:1500]!r}"

    def _draw_launch(self, rng: Random) -> tuple[str, Callable[[], Any], str]:
        """Draws the comments that a recipe opens with, which say how it is launched."""
        line = "# accelerate launch recipes/pretrain.py --config <this file>\n"
        text = rng.choice((line, damage(line.encode(), rng), odd_text(rng, 300), line * 2 + odd_text(rng, 60)))
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        self.path.write_bytes(data)
        path = rng.choice((self.path, self.path, self.path.parent, self.path.parent / "missing.yaml"))
        return "launch_command", lambda: launch_command(path, ["--seed", "1"]), f"{path} {data!r}"
