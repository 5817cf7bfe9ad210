"""Folders of models, damaged: configurations, weights, tokenizers, indexes, and what does not belong there."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

import hf_mm
from hf_mm.checkpoint_info import describe_checkpoint
from hf_mm.loading import load_pipeline

from .models import save_pipelines
from .values import damage, mutate, odd_value, places_of


DOORS: dict[str, Callable[[Path], Any]] = {
    "AutoModelForMultimodalLM": AutoModelForMultimodalLM.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoProcessor": AutoProcessor.from_pretrained,
    "load_pipeline": lambda folder: load_pipeline(str(folder), trust_remote_code=False),
    "describe_checkpoint": lambda folder: describe_checkpoint(str(folder)),
}
OWN_DOORS: dict[str, Callable[[Path], Any]] = {
    "TransfusionForConditionalGeneration": hf_mm.TransfusionForConditionalGeneration.from_pretrained,
    "CM3LeonForConditionalGeneration": hf_mm.CM3LeonForConditionalGeneration.from_pretrained,
}
ABSURD = (
    0,
    -1,
    1,
    3,
    2**20,
    2**31,
    10**9,
    10**15,
    2**70,
    1e30,
    -1.5,
    "16",
    "",
    None,
    True,
    [],
    {},
    [16],
    "relu",
    float("nan"),
)
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Trap:
    """Would leave a file behind if a checkpoint's pickle were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


class CheckpointInputs:
    """Draws damaged folders of models and the door that each is given to.

    Args:
        folder (`Path`): For whole models, and one damaged one at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.models, self.place, self.trap = save_pipelines(folder / "models"), folder / "case", folder / "trap"

    def draw(self, rng: Random) -> tuple[str, Callable[[], Any], str]:
        """Returns the name of a door, a call of it, and the input as text."""
        model = rng.choice(self.models)
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(model, self.place)
        damages = {
            self._change_config: 0.4,
            self._damage_file: 0.2,
            self._change_weights: 0.2,
            self._remove_file: 0.07,
            self._swap_files: 0.05,
            self._put_pickle: 0.04,
            self._split_weights: 0.04,
        }
        shown = [model.name]
        for _ in range(rng.choice((1, 1, 1, 2))):
            (change,) = rng.choices(list(damages), list(damages.values()))
            shown.append(change(rng))
        own = {name: door for name, door in OWN_DOORS.items() if name.lower().startswith(model.name.split("_")[0])}
        doors = {**DOORS, **(own if rng.random() < 0.95 else OWN_DOORS)}
        door = rng.choice(list(doors))
        return door, lambda: self._load(doors[door]), ": ".join(shown)[:600]

    def _load(self, door: Callable[[Path], Any]) -> None:
        """Loads the folder; what it holds must not have run."""
        try:
            loaded = door(self.place)
        finally:
            if self.trap.exists():
                self.trap.unlink()
                raise AssertionError("a pickle of the checkpoint was executed")
        if isinstance(loaded, torch.nn.Module) and any(weight.is_meta for weight in loaded.parameters()):
            raise AssertionError("a model was loaded without its weights")

    def _files(self, suffix: str = "") -> list[Path]:
        return sorted(path for path in self.place.rglob(f"*{suffix}") if path.is_file())

    def _change_config(self, rng: Random) -> str:
        """Changes fields of a JSON file, mostly of the model's configuration."""
        path = self.place / CONFIG
        if rng.random() < 0.35:
            path = rng.choice([file for file in self._files(".json") if file.name != "tokenizer.json"])
        if not path.is_file():
            return "no config"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return "damaged already"
        if rng.random() < 0.6 and (places := places_of(config)):
            *way, key = rng.choice(places)
            holder = config
            for step in way:
                holder = holder[step]
            holder[key] = rng.choice(ABSURD)
            shown = f"{path.name} {[*way, key]}={holder[key]!r}"
        else:
            config = mutate(config, rng, rng.choice((1, 1, 2))) if rng.random() < 0.97 else odd_value(rng)
            shown = f"{path.name}={config!r}"
        path.write_text(json.dumps(config, default=str), encoding="utf-8", errors="surrogatepass")
        return shown

    def _damage_file(self, rng: Random) -> str:
        """Damages the bytes of a file."""
        weights = self.place / WEIGHTS
        path = weights if weights.is_file() and rng.random() < 0.4 else rng.choice(self._files())
        path.write_bytes(damage(path.read_bytes(), rng))
        return f"{path.name} damaged"

    def _change_weights(self, rng: Random) -> str:
        """Leaves tensors out, adds some, or changes their shape, type or numbers."""
        try:
            tensors = load_file(self.place / WEIGHTS)
        except Exception:  # damaged already
            return "no weights"
        if not tensors:
            return "no tensors"
        name = rng.choice(list(tensors))
        kind = rng.choice(("missing", "extra", "shape", "flat", "empty", "dtype", "nan", "renamed", "swapped", "none"))
        changed = {
            "extra": lambda: tensors.update({"extra.weight": torch.zeros(3)}),
            "shape": lambda: tensors.update({name: torch.zeros(*tensors[name].shape, 2)}),
            "flat": lambda: tensors.update({name: tensors[name].flatten()}),
            "empty": lambda: tensors.update({name: torch.zeros(0)}),
            "dtype": lambda: tensors.update(
                {name: tensors[name].to(rng.choice((torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn)))}
            ),
            "nan": lambda: tensors.update({name: torch.full_like(tensors[name], float("nan"))}),
            "renamed": lambda: tensors.update({name.replace(".", "_"): tensors.pop(name)}),
            "missing": lambda: tensors.pop(name),
            "swapped": lambda: tensors.update(
                {other: tensors[name].clone() for other in rng.sample(list(tensors), 1)}
            ),
            "none": tensors.clear,
        }
        changed[kind]()
        save_file(tensors, self.place / WEIGHTS, metadata=rng.choice(({"format": "pt"}, None, {"format": "tf"})))
        return f"{kind} {name}"

    def _remove_file(self, rng: Random) -> str:
        """Removes a file, or puts a folder in its place."""
        path = rng.choice(self._files())
        path.unlink()
        if rng.random() < 0.2:
            path.mkdir()
        return f"{path.name} removed"

    def _swap_files(self, rng: Random) -> str:
        """Puts one file, of this model or of another, in the place of another."""
        path, other = rng.choice(self._files()), rng.choice(self._files())
        source = rng.choice(self.models) / path.name
        shutil.copy(source if source.is_file() and rng.random() < 0.5 else other, f"{path}.tmp")
        shutil.move(f"{path}.tmp", path)
        return f"{path.name} swapped"

    def _put_pickle(self, rng: Random) -> str:
        """Puts a pickle that does something in the place of the weights, under their name or that of old."""
        weights = self.place / WEIGHTS
        if weights.is_dir():  # put there before
            weights.rmdir()
        weights.unlink(missing_ok=True)
        name = rng.choice(("pytorch_model.bin", WEIGHTS, "diffusion_pytorch_model.bin", "model.pt"))
        (self.place / name).write_bytes(pickle.dumps(Trap(self.trap)))
        if rng.random() < 0.5:
            torch.save({"model.embed_tokens.weight": Trap(self.trap)}, self.place / name)
        return f"{name} a pickle"

    def _split_weights(self, rng: Random) -> str:
        """Writes an index of shards that are not all there, or not what it says."""
        weights = self.place / WEIGHTS
        try:
            names = list(load_file(weights))
        except Exception:  # damaged already
            return "no weights"
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        index = {"metadata": {"total_size": 1}, "weight_map": {name: rng.choice(files) for name in names}}
        index = mutate(index, rng, 1) if rng.random() < 0.5 else index
        (self.place / f"{WEIGHTS}.index.json").write_text(json.dumps(index, default=str), encoding="utf-8")
        for file in files[: rng.choice((0, 1, 2))]:
            shutil.copy(weights, self.place / file)
        weights.unlink()
        return "shards"
