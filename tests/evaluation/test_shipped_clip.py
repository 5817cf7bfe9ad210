"""The CLIP that ships chooses the right caption of pictures that its training never showed."""

import json

import torch
from transformers import CLIPModel, CLIPProcessor

import hf_mm
from hf_mm.data.icon_scenes import icon_scenes_dataset


def test_the_clip_that_ships_finds_the_caption_of_a_picture():
    folder = hf_mm.CHECKPOINTS / "clip-tiny"
    clip, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    rows = icon_scenes_dataset(
        64, glyph_set="shapes", split="validation", size_px=32, seed=5, kinds={"single_object": 1.0}
    )
    looks = [tuple((item["glyph"], item["color"]) for item in json.loads(scene)["objects"]) for scene in rows["scene"]]
    inputs = processor(
        text=list(rows["description"]), images=list(rows["image"]), padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        best = clip(**inputs).logits_per_image.argmax(dim=1).tolist()
    # One scene may be worded in several ways, so that the object counts and not the words.
    right = sum(looks[picture] == looks[caption] for picture, caption in enumerate(best))
    assert right >= 60
