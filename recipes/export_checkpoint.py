"""Makes a Hub repo folder of any checkpoint of a run, sharded or whole, in one process on the CPU.

python recipes/export_checkpoint.py --checkpoint runs/mine/checkpoint-1000 --output_dir runs/mine_1000

What the model is, the checkpoint says; its text tokenizer is looked for beside it. Weights are the moving average
where the run has one. `recipes/publish.py` uploads the folder.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from accelerate import Accelerator

from building import ModelArguments, build_model, find_text_tokenizer, load_config
from hf_mm.cards import spell_command
from hf_mm.hub import export_folder
from hf_mm.text_to_image import build_drawing_pipeline
from hf_mm.training.checkpoint import MANIFEST_NAME, is_complete
from hf_mm.training.consolidation import load_consolidated
from hf_mm.training.recipe import parse_recipe
from reporting import CARDS, card_values, describe_model


@dataclass
class ExportArguments:
    """Which checkpoint, and where to."""

    checkpoint: str = field(metadata={"help": "Folder checkpoint-N of a run."})
    output_dir: str = field(metadata={"help": "Folder for the model; made if missing."})


def main(argv: Sequence[str] | None = None) -> Path:
    """Builds the model that the checkpoint is of, loads the weights, and writes the folder."""
    argv = sys.argv[1:] if argv is None else argv
    (arguments,) = parse_recipe(ExportArguments, argv=argv)
    checkpoint, output_dir = Path(arguments.checkpoint), Path(arguments.output_dir)
    if not is_complete(checkpoint):
        raise ValueError(f"`checkpoint`={str(checkpoint)!r} is no whole checkpoint: a folder checkpoint-N of a run.")
    if output_dir.resolve() == checkpoint.resolve():
        raise ValueError(f"`output_dir`={str(output_dir)!r} is the checkpoint itself. Name another folder.")
    saved = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
    identity = saved["identity"]
    if identity.get("lora_rank"):
        raise ValueError(
            f"`checkpoint`={str(checkpoint)!r} holds adapters of rank {identity['lora_rank']}, not a model. Finish "
            "the run: recipes/sft.py merges them, and saves them alone."
        )
    model_args = ModelArguments(**{item.name: identity[item.name] for item in fields(ModelArguments)})
    run_dir = checkpoint.resolve().parent
    if model_args.tokenizer_name is None and model_args.model_name_or_path is None:
        model_args.tokenizer_name = str(run_dir / "text_tokenizer")
    config = load_config(model_args)
    tokenizer = find_text_tokenizer(model_args, None, run_dir, Accelerator(cpu=True))  # there is one: nothing is read
    model, processor = build_model(model_args, config, tokenizer)
    is_averaged = load_consolidated(checkpoint, model)
    if identity.get("edit_template") is not None:  # a tuning's own
        processor.edit_template = identity["edit_template"]

    recipe = {"push_to_hub": None, **asdict(model_args), **identity}
    facts = {
        "command": spell_command("export_checkpoint.py", argv),
        "seed": identity["seed"],
        "step": saved["step"],
    }
    pipeline = build_drawing_pipeline(model.eval(), processor)
    output_dir.mkdir(parents=True, exist_ok=True)
    export_folder(
        pipeline,
        output_dir,
        card_template=CARDS / "checkpoint.md",
        card_data=describe_model(model, recipe),
        card_values={**card_values(output_dir, model, facts, recipe, ""), "is_averaged": is_averaged},
    )
    print(f"Step {saved['step']} of {run_dir} is in {output_dir}.")
    return output_dir


if __name__ == "__main__":
    main()
