"""A tokenizer of patches is made in one command, and is read like any other."""

import copy
import json
from importlib import util

import numpy as np
import pytest
import torch
from diffusers import VQModel
from huggingface_hub import ModelCard
from PIL import Image

import encode_images
import make_patch_codes
from hf_mm.data.icon_scenes import draw_scene
from hf_mm.data.image_encoding import read_manifest
from hf_mm.training.patch_autoencoder import build_patch_autoencoder


WORDS = ["--dataset_name=icon_scenes:shapes", "--num_scenes=60", "--num_pictures=40", "--num_vq_embeddings=300"]


@pytest.fixture
def make(tmp_path):
    def run(folder: str, *words: str):
        return make_patch_codes.main([*WORDS, f"--output_dir={tmp_path / folder}", *words])

    return run


def test_a_tokenizer_is_made_that_redraws_pictures_and_encodes_rows(make, tmp_path, capsys):
    pytest.importorskip("faiss")
    folder = make("codes", "--num_scale_images=20")
    assert f"The tokenizer is in {folder}, with " in capsys.readouterr().out
    usage = json.loads((folder / "codebook_usage.json").read_text())
    assert usage["num_pictures"] == 20 and 0.05 < usage["used_share"] <= 1
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.width > 32
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert "k-means of the patches of 40 pictures" in card.text and "recipes/make_patch_codes.py" in card.text

    vq = VQModel.from_pretrained(folder, use_safetensors=True).eval()
    with torch.inference_mode():
        picture = vq.decode(vq.quantize.embedding.weight[5].view(1, -1, 1, 1), force_not_quantize=True).sample
    assert picture.shape == (1, 3, 4, 4)
    again = VQModel.from_pretrained(make("again"), use_safetensors=True)
    assert torch.equal(vq.quantize.embedding.weight, again.quantize.embedding.weight)

    encoded = tmp_path / "encoded"
    encode_images.main(
        [
            *WORDS[:2],
            "--image_size=32",
            f"--image_tokenizer_name={folder}",
            f"--output_dir={encoded}",
            "--num_shards=2",
        ]
    )
    assert read_manifest(encoded)["encoder"]["num_codes"] == 300
    with pytest.raises(ValueError, match="`image_size`=64 is more than the 32 pixels up to which the decoder"):
        encode_images.main(
            [*WORDS[:2], "--image_size=64", f"--image_tokenizer_name={folder}", f"--output_dir={tmp_path / 'large'}"]
        )
    assert not (tmp_path / "large").exists()


def test_shared_patterns_redraw_better_than_as_many_of_pooled_patches(make):
    pytest.importorskip("faiss")
    pictures = [np.array(draw_scene(number, 5, 32, "shapes")["image"]) for number in range(16)]
    pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 127.5 - 1

    def error(folder) -> float:
        vq = VQModel.from_pretrained(folder, use_safetensors=True).eval()
        with torch.inference_mode():
            return (vq.decode(vq.encode(pixels).latents).sample - pixels).abs().mean().item()

    words = ("--num_vq_embeddings=2000", "--num_scenes=400", "--num_pictures=400")
    assert error(make("shared", *words, "--shared_patterns=true")) < error(make("pooled", *words))


def test_without_faiss_it_is_said_before_pictures_are_drawn(make, monkeypatch):
    find_spec = util.find_spec
    monkeypatch.setattr(
        "hf_mm.training.patch_codes.find_spec", lambda name: None if name == "faiss" else find_spec(name)
    )
    monkeypatch.setattr(make_patch_codes, "open_pictures", lambda *args, **kwargs: pytest.fail("pictures were opened"))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf_mm\[retrieval\]'"):
        make("never")


@torch.inference_mode()
def test_codes_are_found_in_float32_whatever_is_around():
    vq = build_patch_autoencoder(4, 32, num_codes=4000).bfloat16().float()
    vq.quantize.embedding.weight.copy_(torch.rand(4000, 48) * 2 - 1)
    vq.bfloat16()
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    expected = encode_images.CodeEncoder(copy.deepcopy(vq).float(), torch.device("cpu"))(pixels)["codes"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_images.CodeEncoder(vq, torch.device("cpu"))(pixels)["codes"], expected)


@pytest.mark.parametrize("name", ["num_vq_embeddings", "num_pictures", "num_scale_images"])
def test_numbers_of_nothing_are_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}`=0 must be at least 1"):
        make("wrong", f"--{name}=0")


def test_sizes_that_do_not_fit_are_refused(make, tmp_path):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="`image_size`=30 must be a multiple of `patch_size`=4"):
        make("wrong", "--image_size=30")
    assert not (tmp_path / "wrong").exists()
