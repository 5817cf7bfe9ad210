import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_mm.cm3leon import CM3LeonImageProcessor


def processor(size=8, **fields):
    return CM3LeonImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **{"vq_stride": 2, **fields}
    )


def test_pictures_become_centre_crops_in_minus_one_to_one(picture):
    pixels = processor()(picture(height=11, width=23), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1


def test_a_picture_of_the_right_size_keeps_every_pixel(picture):
    image = picture(height=8, width=8)
    pixels = processor()(image, return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    kept = processor(do_resize=False, do_center_crop=False)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(kept, pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_every_colour_mode_becomes_rgb(picture, mode):
    image = picture(mode="RGBA" if mode in ("RGBA", "LA") else "RGB").convert(mode)
    assert processor()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)


def test_transparent_parts_lie_on_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert torch.equal(processor()(image, return_tensors="pt")["pixel_values"], torch.ones(1, 3, 8, 8))


def test_pictures_are_turned_upright():
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # turned by a quarter
    upright, plain = (processor()(each, return_tensors="pt")["pixel_values"] for each in (turned, image))
    assert torch.equal(upright, plain)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 16), (16, 16)])
def test_a_picture_of_another_size_is_refused_even_with_as_many_codes(picture, height, width):
    with pytest.raises(ValueError, match=rf"images.*\[1\].*{height} x {width}.*codes.*8 x 8, 16 codes"):
        processor(do_resize=False, do_center_crop=False)([picture(0, 8, 8), picture(1, height, width)])
    with pytest.raises(ValueError, match="images.*8 x 8, 16 codes"):
        processor()(picture(), size={"shortest_edge": 32}, crop_size={"height": height, "width": width})


def test_settings_survive_saving(tmp_path):
    processor(size=12, vq_stride=4).save_pretrained(tmp_path)
    for again in (CM3LeonImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(again) is CM3LeonImageProcessor
        assert again.vq_stride == 4 and again.grid == (3, 3)
