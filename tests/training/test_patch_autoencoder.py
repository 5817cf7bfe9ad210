"""An autoencoder of patches: what is encoded comes back as it was, and nothing was trained."""

import pytest
import torch
from diffusers import VQModel

from hf_mm.training.patch_autoencoder import build_patch_autoencoder


TOLERANCE = 0.035  # of pixels in [-1, 1]: four grey levels of 255


def make_images(num_images: int, height: int, width: int) -> torch.Tensor:
    return torch.rand((num_images, 3, height, width), generator=torch.Generator().manual_seed(1)) * 2 - 1


def redraw(vq: VQModel, images: torch.Tensor) -> torch.Tensor:
    return vq.decode(vq.encode(images).latents, force_not_quantize=True).sample


@pytest.mark.parametrize(("patch_size", "image_size"), [(2, 8), (2, 64), (4, 32), (4, 64), (8, 64)])
@torch.no_grad()
def test_pictures_come_back_as_they_were(patch_size, image_size):
    vq = build_patch_autoencoder(patch_size, image_size, num_codes=3).eval()
    images = make_images(4, image_size, image_size)
    images[1], images[2] = 1, -1  # whose norms have other means
    images[3, :, 1:6, 2:7] = 1
    latents = vq.encode(images).latents
    patches = torch.nn.functional.pixel_unshuffle(images, patch_size)
    # The same values in another order, which is the same for every patch of every picture.
    order = [(patches - latents[:, [n]]).abs().amax((0, 2, 3)).argmin().item() for n in range(len(latents[0]))]
    assert sorted(order) == list(range(3 * patch_size**2))
    torch.testing.assert_close(latents, patches[:, order], atol=0.001, rtol=0)
    torch.testing.assert_close(redraw(vq, images), images, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(redraw(vq, images[3:]), images[3:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_patch_that_is_repeated_all_over_comes_back():
    """Of four pixels that the decoder makes of one all neighbours are alike, so nothing but their place tells."""
    patch = make_images(1, 4, 4)
    images = patch.repeat(1, 1, 8, 8)
    torch.testing.assert_close(
        redraw(build_patch_autoencoder(4, 32, 3).eval(), images), images, atol=TOLERANCE, rtol=0
    )


@torch.no_grad()
def test_smaller_pictures_come_back_and_oblong_ones():
    vq, images = build_patch_autoencoder(4, 32, num_codes=3).eval(), make_images(2, 12, 20)
    torch.testing.assert_close(redraw(vq, images), images, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_weights_are_the_same_in_bfloat16():
    vq = build_patch_autoencoder(4, 32, num_codes=3).eval()
    for name, weight in vq.state_dict().items():
        if not name.startswith("quantize"):
            assert torch.equal(weight, weight.bfloat16().float()), name


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 9), "`patch_size`=3 must be a power of two"),
        ((1, 9), "`patch_size`=1 must be a power of two"),
        ((4, 30), "`image_size`=30 must be a multiple of `patch_size`=4"),
        ((4, 0), "`image_size`=0 must be a multiple"),
        ((4, 96), "`image_size`=96 must be at most 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        build_patch_autoencoder(*sizes, num_codes=3)
