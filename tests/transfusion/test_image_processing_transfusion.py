import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_mm.transfusion import TransfusionImageProcessor


def processor(size=8, **fields):
    return TransfusionImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **{"patch_size": 2, **fields}
    )


def keep_sizes(**fields):
    return TransfusionImageProcessor(do_resize=False, do_center_crop=False, **{"patch_size": 2, **fields})


def test_pictures_become_centre_crops_in_minus_one_to_one(picture):
    pixels = processor()(picture(height=11, width=23), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1


def test_a_picture_of_the_right_size_keeps_every_pixel(picture):
    image = picture(height=8, width=8)
    pixels = processor()(image, return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_every_colour_mode_becomes_rgb(picture, mode):
    image = picture(mode="RGBA" if mode in ("RGBA", "LA") else "RGB").convert(mode)
    assert processor()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)


def test_transparent_parts_lie_on_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert torch.equal(processor()(image, return_tensors="pt")["pixel_values"], torch.ones(1, 3, 8, 8))


def test_pictures_are_turned_upright():
    image = Image.new("RGB", (8, 6))
    image.getexif()[0x0112] = 6  # turned by a quarter
    assert keep_sizes()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 6)


def test_pictures_of_different_sizes_are_padded_and_their_sizes_told(picture):
    images = [picture(0, 8, 12), picture(1, 4, 16)]
    out = keep_sizes(vae_stride=2)(images, return_tensors="pt")
    assert out["pixel_values"].shape == (2, 3, 8, 16) and out["image_sizes"].tolist() == [[4, 6], [2, 8]]
    for number, (height, width) in enumerate([(8, 12), (4, 16)]):
        alone = keep_sizes(vae_stride=2)(images[number], return_tensors="pt")
        assert "image_sizes" not in alone
        torch.testing.assert_close(out["pixel_values"][number, :, :height, :width], alone["pixel_values"][0])


def test_a_size_off_the_stride_is_refused(picture):
    with pytest.raises(ValueError, match=r"images.*\[1\].*8 x 10.*multiples of 4.*factor 2.*size 2"):
        keep_sizes(vae_stride=2)([picture(0, 8, 12), picture(1, 8, 10)], return_tensors="pt")


def test_settings_survive_saving(tmp_path):
    processor(8, vae_stride=4, patch_size=8).save_pretrained(tmp_path)
    again = TransfusionImageProcessor.from_pretrained(tmp_path)
    assert (again.vae_stride, again.patch_size) == (4, 8) and dict(again.crop_size) == {"height": 8, "width": 8}
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is TransfusionImageProcessor
