"""Codes of patches: a latent pixel is the pixels under it, and a code the mean of patches that are alike."""

import re

import pytest
import torch
from diffusers import VQModel

from hf_mm.training.image_tokenizer_codecs import find_codes
from hf_mm.training.patch_codes import cluster_patches, find_patch_fault, read_patches, set_patch_encoder


pytest.importorskip("faiss")


def make_vq(
    block_out_channels: list[int],
    norm_num_groups: int,
    num_codes: int = 7,
    layers_per_block: int = 1,
    mid_block_add_attention: bool = True,
) -> VQModel:
    num_levels = len(block_out_channels)
    torch.manual_seed(0)
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        latent_channels=3 * 4 ** (num_levels - 1),
        norm_num_groups=norm_num_groups,
        num_vq_embeddings=num_codes,
        mid_block_add_attention=mid_block_add_attention,
    )
    set_patch_encoder(vq)
    return vq.eval()


def make_images(num_images: int, height: int = 12, width: int = 20) -> torch.Tensor:
    return torch.rand((num_images, 3, height, width), generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("block_out_channels", "norm_num_groups", "layers_per_block"),
    [([32, 64, 128], 8, 1), ([12, 48, 98], 1, 2), ([16, 32], 4, 1), ([12, 36], 3, 3)],
)
@torch.no_grad()
def test_a_latent_pixel_is_the_pixels_under_it(block_out_channels, norm_num_groups, layers_per_block):
    vq, images = make_vq(block_out_channels, norm_num_groups, layers_per_block=layers_per_block), make_images(2)
    side = 2 ** (len(block_out_channels) - 1)
    latents = vq.encode(images).latents
    patches = torch.nn.functional.pixel_unshuffle(images, side)
    assert latents.shape == patches.shape
    # The same values in another order, which is the same for every patch of every picture.
    order = [
        (patches - latents[:, [channel]]).abs().amax((0, 2, 3)).argmin().item() for channel in range(len(latents[0]))
    ]
    assert sorted(order) == list(range(len(latents[0])))
    torch.testing.assert_close(latents, patches[:, order], atol=0.01, rtol=0)


@torch.no_grad()
def test_codes_are_read_as_the_patches_that_they_stand_for():
    vq = make_vq([12, 48, 98], 1, num_codes=4)
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
    vq = make_vq([16, 32], 4)
    images = make_images(40)
    cluster_patches(vq, images, seed=0)
    codes = find_codes(vq, vq.encode(images).latents)
    others = torch.full_like(images, -1.0)
    others[:, :, 4:8, 6:10] = images[:, :, 4:8, 6:10]
    assert torch.equal(find_codes(vq, vq.encode(others).latents)[:, 2:4, 3:5], codes[:, 2:4, 3:5])


@torch.no_grad()
def test_a_code_is_the_mean_of_the_patches_that_it_stands_for():
    vq, images = make_vq([16, 32], 4, num_codes=5), make_images(10)
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
        cluster_patches(make_vq([16, 32], 4), torch.zeros(2, 3, 8, 8), seed=0)


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
    vq = make_vq([16, 32], 4, num_codes=4 + 3 * 3 + 1)  # colours, three patterns in three pairs, and one left over
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
    vq = make_vq([16, 32], 4, num_codes=3 + 2 * 3)  # three patterns in two pairs; in three pairs two
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
        cluster_patches(make_vq([16, 32], 4, num_codes=num_codes), images, seed=0, shared_patterns=True)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (([32, 64, 128], 1, 8, 32), "`latent_channels`=32 must be 48"),
        (([32, 64, 128], 0, 8, 48), "`layers_per_block`=0 must be at least 1"),
        (([32, 64, 96], 1, 8, 48), r"`block_out_channels`=\[32, 64, 96\] must be at least \[12, 48, 112\]"),
        (([128, 128, 128], 1, 8, 48), r"must be at least \[12, 48, 129\]"),
        (([64], 1, 8, 3), r"`block_out_channels`=\[64\] must have at least two levels"),
    ],
)
def test_what_cannot_pass_patches_on_is_named(shape, words):
    assert re.search(words, find_patch_fault(*shape))
