"""Makes a `VQModel` whose codes are patches of pixels: k-means of those of some pictures. Nothing is trained.

accelerate launch recipes/make_patch_codes.py --config recipes/configs/patch_codes_32px.yaml
accelerate launch recipes/make_patch_codes.py --dataset_name my/pictures --image_size 64 --patch_size 4 \
    --output_dir runs/my_codes

For pictures that are drawn, such as icons, maps and pixel art: photographs become mosaics of a few thousand kinds of
patches. Takes minutes on one process; others that are started wait. The folder is then a Hub repo folder, which
recipes/encode_images.py reads.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hf_mm.cards import spell_command, write_card
from hf_mm.data.pictures import TrainingPictures
from hf_mm.data.sources import DatasetArguments, open_pictures
from hf_mm.training.codebook import save_usage
from hf_mm.training.image_tokenizer_codecs import save_reconstructions
from hf_mm.training.patch_autoencoder import build_patch_autoencoder
from hf_mm.training.patch_codes import cluster_patches, require_faiss
from hf_mm.training.recipe import end_processes, parse_recipe, start_processes
from reporting import CARDS, card_values, describe_origin


@dataclass
class PatchCodeArguments:
    """Which patches there are codes for."""

    image_size: int = field(default=32, metadata={"help": "Pixels of a side; pictures are cropped and resized."})
    patch_size: int = field(default=4, metadata={"help": "Pixels of a patch's side, a power of two from 2 on."})
    num_vq_embeddings: int = field(default=8192, metadata={"help": "Codes."})
    shared_patterns: bool = field(
        default=False,
        metadata={"help": "For drawn pictures of few colours: a code for each pattern in each two colours that meet."},
    )
    num_pictures: int = field(default=12000, metadata={"help": "Pictures whose patches are looked at."})
    num_scale_images: int = field(default=512, metadata={"help": "Pictures the usage is measured on."})
    output_dir: str = field(default="runs/patch_codes", metadata={"help": "Folder for the tokenizer."})
    seed: int = field(default=0, metadata={"help": "Seed of embedded scenes, and of which patches k-means begins at."})

    def __post_init__(self) -> None:
        """Refuses numbers of nothing."""
        for name in ("num_vq_embeddings", "num_pictures", "num_scale_images"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"`{name}`={number} must be at least 1.")


def make(arguments: PatchCodeArguments, data_args: DatasetArguments, argv: Sequence[str]) -> str:
    """Finds the codes, measures how many are used and saves the tokenizer; says where it is, and what was measured."""
    require_faiss()
    vq = build_patch_autoencoder(arguments.patch_size, arguments.image_size, arguments.num_vq_embeddings).eval()
    rows = open_pictures(data_args, image_size=arguments.image_size, seed=arguments.seed)
    pictures = TrainingPictures(rows, arguments.image_size, None, arguments.seed)
    images = pictures.draw(arguments.num_pictures, torch.Generator().manual_seed(arguments.seed))
    cluster_patches(vq, images, arguments.seed, shared_patterns=arguments.shared_patterns)

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    num_measured = min(arguments.num_scale_images, len(rows))
    measured = save_usage(vq, (pictures.pixels(n)[None] for n in range(num_measured)), num_measured, folder)
    save_reconstructions(vq, pictures.first(8), folder / "reconstructions.png")
    vq.save_pretrained(folder)
    recipe = asdict(arguments) | asdict(data_args)
    facts = {"command": spell_command("make_patch_codes.py", argv), "seed": arguments.seed}
    own = {"num_pictures": len(images), "measured": f"On {num_measured} pictures: {measured}."}
    own["shared_patterns"] = arguments.shared_patterns
    data = {"library_name": "diffusers", "pipeline_tag": "image-to-image", **describe_origin(recipe)}
    write_card(folder, CARDS / "patch_codes.md", data, {**card_values(folder, vq, facts, recipe, ""), **own})
    return f"The tokenizer is in {folder}, with {measured}."


def main(argv: Sequence[str] | None = None) -> Path:
    """Lets the main process make the tokenizer."""
    argv = sys.argv[1:] if argv is None else argv
    arguments, data_args = parse_recipe(PatchCodeArguments, DatasetArguments, argv=argv)
    state = start_processes()
    if state.is_main_process:
        print(make(arguments, data_args, argv))
    state.wait_for_everyone()
    end_processes(state)
    return Path(arguments.output_dir)


if __name__ == "__main__":
    main()
