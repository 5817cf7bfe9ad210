"""Codes of patches: a code is the mean of patches that are alike."""

import pytest
import torch
from diffusers import VQModel

from hf_mm.training.image_tokenizer_codecs import find_codes
from hf_mm.training.patch_autoencoder import build_patch_autoencoder
from hf_mm.training.patch_codes import cluster_patches, read_patches


pytest.importorskip("faiss")


def make_vq(patch_size: int, num_codes: int = 7) -> VQModel:
    return build_patch_autoencoder(patch_size, 20, num_codes).eval()


def make_images(num_images: int, height: int = 12, width: int = 20) -> torch.Tensor:
    return torch.rand((num_images, 3, height, width), generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_codes_are_read_as_the_patches_that_they_stand_for():
    vq = make_vq(4, num_codes=4)
    images = make_images(4, 4, 4)
    cluster_patches(vq, images, seed=0)
    patches = read_patches(vq)
    assert patches.shape == (4, 16, 3)
    shown = images.movedim(1, -1).flatten(1, 2)  # (4, P, 3), places in another order
    assert torch.equal(
        patches.sort(1).values.sum((1, 2)).sort().values, shown.sort(1).values.sum((1, 2)).sort().values
    )
    vq.encoder.conv_out.bias.data += 0.1
    assert read_patches(vq) is None


@torch.no_grad()
def test_codes_do_not_depend_on_what_is_around_them():
    vq = make_vq(2)
    images = make_images(40)
    cluster_patches(vq, images, seed=0)
    codes = find_codes(vq, vq.encode(images).latents)
    others = torch.full_like(images, -1.0)
    others[:, :, 4:8, 6:10] = images[:, :, 4:8, 6:10]
    assert torch.equal(find_codes(vq, vq.encode(others).latents)[:, 2:4, 3:5], codes[:, 2:4, 3:5])


@torch.no_grad()
def test_a_code_is_the_mean_of_the_patches_that_it_stands_for():
    vq, images = make_vq(2, num_codes=5), make_images(10)
    cluster_patches(vq, images, seed=0)
    codes, latents = vq.quantize.embedding.weight, vq.encode(images).latents
    patches, numbers = latents.movedim(1, -1).flatten(0, 2), find_codes(vq, latents).flatten()
    means = torch.stack([patches[numbers == number].mean(0) for number in range(5)])
    assert (codes - means).norm() < 0.2 * (codes - means.roll(1, 0)).norm()  # a few iterations before they meet
    before = codes.clone()
    cluster_patches(vq, images, seed=0)
    assert torch.equal(codes, before)


def test_more_codes_than_patches_are_refused():
    with pytest.raises(ValueError, match="`num_vq_embeddings`=7 is more than the 1 different patches"):
        cluster_patches(make_vq(2), torch.zeros(2, 3, 8, 8), seed=0)


RED, BLUE, WHITE, GRAY = (0.7, -0.8, -0.6), (-0.8, -0.4, 0.8), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)


def paint(pattern: list[float], shape: tuple[float, ...], ground: tuple[float, ...]) -> torch.Tensor:
    share = torch.tensor(pattern).view(1, 2, 2)
    return torch.tensor(ground).view(3, 1, 1) * (1 - share) + torch.tensor(shape).view(3, 1, 1) * share


@torch.no_grad()
def test_a_shared_pattern_has_a_code_in_colors_that_it_was_never_seen_in():
    corner, edge, faint = [1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0.5, 0, 0.0]
    seen = [(corner, RED, WHITE), (edge, RED, WHITE), (edge, BLUE, GRAY), (faint, BLUE, GRAY), (edge, RED, GRAY)]
    plain = [([0.0] * 4, color, color) for color in (RED, BLUE, WHITE, GRAY)]
    images = torch.stack([paint(*patch) for patch in seen + plain]).clamp(-1, 1)
    vq = make_vq(2, num_codes=4 + 3 * 3 + 1)  # colours, three patterns in three pairs, and one left over
    cluster_patches(vq, images, seed=0, shared_patterns=True)
    unseen = torch.stack([paint(corner, BLUE, GRAY), paint(corner, RED, GRAY), paint(faint, RED, WHITE)])
    for pictures in (images, unseen):
        latents = vq.encode(pictures).latents
        codes = vq.quantize.embedding(find_codes(vq, latents)).permute(0, 3, 1, 2)
        torch.testing.assert_close(codes, latents, atol=0.02, rtol=0)


@torch.no_grad()
def test_two_colors_that_hardly_meet_take_no_codes_from_others():
    shapes = [[1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0.5, 0, 0.0]]
    often = [paint(shape, color, WHITE) for shape in shapes for color in (RED, BLUE)]
    plain = [paint([0.0] * 4, color, color) for color in (RED, BLUE, WHITE)]
    images = torch.stack([*often * 100, *plain, paint([1.0, 1, 0, 0], RED, BLUE)])
    vq = make_vq(2, num_codes=3 + 2 * 3)  # three patterns in two pairs; in three pairs two
    cluster_patches(vq, images, seed=0, shared_patterns=True)
    latents = vq.encode(torch.stack(often)).latents
    codes = vq.quantize.embedding(find_codes(vq, latents)).permute(0, 3, 1, 2)
    torch.testing.assert_close(codes, latents, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("images", "num_codes", "words"),
    [
        (make_images(40, 2, 2), 7, "have 0 patches of one colour that differ. From 2 to 32"),
        (make_images(40, 1, 1).expand(-1, -1, 2, 2), 7, "have 40 patches of one colour"),
        (torch.stack([paint(p, RED, WHITE) for p in ([0.0] * 4, [1.0] * 4, [1.0, 0, 0, 0])]), 2, "leaves 0 patterns"),
        (torch.stack([paint(p, RED, WHITE) for p in ([0.0] * 4, [1.0] * 4, [1.0, 0, 0, 0])]), 4, "leaves 2 patterns"),
        (torch.stack([paint([0.0] * 4, color, color) for color in (RED, WHITE)]), 4, "each of 0 pairs of 2 colours"),
    ],
)
def test_pictures_that_share_no_patterns_are_refused(images, num_codes, words):
    with pytest.raises(ValueError, match=words):
        cluster_patches(make_vq(2, num_codes=num_codes), images, seed=0, shared_patterns=True)
