"""Asks a folder of a model the same in any process; run as a script, in one that cannot import hf_mm.

python -P cold_load.py FOLDER OUTPUT writes the answers to a safetensors file. The script stands alone.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor


PROMPT = "a red star"


def needs_trust(folder: str | Path) -> bool:
    """Tells whether diffusers runs code of this folder, which it asks trust for."""
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    return isinstance(index["_class_name"], list)


@torch.no_grad()
def ask(folder: str | Path, *, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Loads a folder and asks it.

    Args:
        folder (`str` or `Path`): Of a model.
        trust_remote_code (`bool`): Whether its code may run. Without it only what is installed does, and diffusers is
            not asked for a picture where that needs trust.

    Returns:
        `dict[str, torch.Tensor]`: the ids and logits of a prompt, and a picture drawn through diffusers where that
        loads the folder.
    """
    model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    input_ids = processor(text=[PROMPT], return_tensors="pt")["input_ids"]
    answers = {"input_ids": input_ids, "logits": model(input_ids=input_ids).logits.float()}
    if needs_trust(folder) == trust_remote_code:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust_remote_code)
        pipe.set_progress_bar_config(disable=True)
        picture = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np").images
        answers["picture"] = torch.as_tensor(picture).contiguous()
    return answers


if __name__ == "__main__":
    sys.modules["hf_mm"] = None  # type: ignore[assignment]  # whatever imports it fails
    save_file(ask(sys.argv[1], trust_remote_code=True), sys.argv[2])
