"""Publishes a model on the Hub, so that others load it with transformers and diffusers alone.

python recipes/publish.py --model_name_or_path runs/transfusion_tiny --repo_id me/my-model
python recipes/publish.py --model_name_or_path runs/mine --repo_id me/my-model --private --revision v1
python recipes/publish.py --model_name_or_path runs/lora/adapter --repo_id me/my-adapter --base_model me/my-model

The folder is that of a run, of adapters alone, of an image tokenizer or of a CLIP; it stays as it is. What was sent
before a cut is not sent again by the same command. The token is the one of `hf auth login` or of HF_TOKEN: one on the
command line would stay in the shell's history.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from hf_mm.hub import MAX_SHARD_SIZE, publish
from hf_mm.training.recipe import parse_recipe


@dataclass
class PublishArguments:
    """What is published, and where."""

    model_name_or_path: str = field(metadata={"help": "Folder of the model."})
    repo_id: str = field(metadata={"help": "Hub repo, e.g. me/my-model; made if missing."})
    private: bool = field(default=False, metadata={"help": "Whether a new repo is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch, made if missing; none: the main one."})
    overwrite: bool = field(default=False, metadata={"help": "Write into a repo that holds something else."})
    self_contained: bool = field(
        default=True,
        metadata={"help": "Whether diffusers loads it without hf_mm; it then always asks for trust_remote_code=True."},
    )
    base_model: str | None = field(default=None, metadata={"help": "Of adapters: Hub id of what they belong on."})
    max_shard_size: str = field(default=MAX_SHARD_SIZE, metadata={"help": "Largest file of weights."})
    weights_dtype: Literal["bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Rounds the weights for a smaller download; the model computes as before."}
    )
    commit_message: str = field(default="Upload model", metadata={"help": "First line of the commit."})


def main(argv: Sequence[str] | None = None) -> str:
    """Checks, publishes, and says where it is."""
    (arguments,) = parse_recipe(PublishArguments, argv=argv)
    options = asdict(arguments)
    folder, repo_id = options.pop("model_name_or_path"), options.pop("repo_id")
    try:
        address = publish(folder, repo_id, **options)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"{folder} is published: {address}")
    return address


if __name__ == "__main__":
    main()
