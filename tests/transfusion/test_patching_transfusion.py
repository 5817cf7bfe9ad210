import pytest
import torch
from torch import nn

from hf_mm.transfusion.patching_transfusion import build_patch_layers, grid_sinusoids


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_linear_layers_with_identity_weights_give_the_picture_back(make_config, patch_size):
    width = 3 * patch_size**2
    config = make_config(patch_size=patch_size, text_config={"hidden_size": 4 * -(-width // 4) + 4})
    patch_in, patch_out = build_patch_layers(config)
    with torch.no_grad():
        for layer in (patch_in.projection, patch_out.projection):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (patch_in.timestep_embedder.mlp.linear_2,):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    latents = torch.randn(2, 3, 3 * patch_size, 5 * patch_size)
    patches, skips = patch_in(latents, torch.tensor([7, 900]))
    assert patches.shape == (2, 15, config.text_config.hidden_size)
    assert torch.equal(patch_out(patches, torch.tensor([7, 900]), skips, latents.shape[-2:]), latents)


def test_patches_run_in_raster_order_and_inside_by_channel_row_and_column(make_config):
    patch_in, _ = build_patch_layers(make_config())
    latents = torch.randn(1, 3, 4, 6)
    with torch.no_grad():
        patches, _ = patch_in(latents, torch.tensor([0]))
        vector = torch.stack([latents[0, c, 2 + y, 4 + x] for c in range(3) for y in range(2) for x in range(2)])
        expected = patch_in.projection(vector) + patch_in.timestep_embedder(torch.tensor([0]))[0]
    torch.testing.assert_close(patches[0, 5], expected)  # second row of three, last column


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_the_unet_reads_and_draws_every_patch_size(make_config, patch_size):
    config = make_config(patch_layer="unet", patch_size=patch_size)
    patch_in, patch_out = build_patch_layers(config)
    size = (3 * patch_size, 5 * patch_size)
    latents = torch.randn(2, 3, *size, requires_grad=True)
    patches, skips = patch_in(latents, torch.tensor([7, 900]))
    assert patches.shape == (2, 15, config.text_config.hidden_size)
    drawn = patch_out(patches, torch.tensor([7, 900]), skips, size)
    assert drawn.shape == latents.shape
    drawn.square().mean().backward()
    assert all(weight.grad is not None for layer in (patch_in, patch_out) for weight in layer.parameters())


@pytest.mark.parametrize("patch_layer", ["linear", "unet"])
def test_each_image_is_read_by_itself_at_its_own_timestep(make_config, patch_layer):
    patch_in, patch_out = build_patch_layers(make_config(patch_layer=patch_layer))
    latents, times = torch.randn(3, 3, 4, 6), torch.tensor([1, 500, 999])
    with torch.no_grad():
        patches, skips = patch_in(latents, times)
        drawn = patch_out(patches, times, skips, (4, 6))
        for number in range(3):
            one = slice(number, number + 1)
            alone, alone_skips = patch_in(latents[one], times[one])
            torch.testing.assert_close(patches[one], alone, rtol=0, atol=1e-5)
            alone = patch_out(alone, times[one], alone_skips, (4, 6))
            torch.testing.assert_close(drawn[one], alone, rtol=0, atol=1e-5)
        other, _ = patch_in(latents, times + torch.tensor([0, 1, 0]))
    assert torch.equal(other[0], patches[0]) and not torch.equal(other[1], patches[1])


def test_the_unet_uses_its_skips_and_both_its_timesteps(make_config):
    patch_in, patch_out = build_patch_layers(make_config(patch_layer="unet"))
    latents, times = torch.randn(1, 3, 4, 6), torch.tensor([500])
    with torch.no_grad():
        patches, skips = patch_in(latents, times)
        drawn = patch_out(patches, times, skips, (4, 6))
        for number in range(len(skips)):
            changed = tuple(skip + (index == number) for index, skip in enumerate(skips))
            assert not torch.allclose(patch_out(patches, times, changed, (4, 6)), drawn)
        assert not torch.allclose(patch_out(patches, times + 1, skips, (4, 6)), drawn)


def test_the_first_level_of_the_unet_at_the_paper_width_builds_for_patches_of_one_pixel(make_config):
    config = make_config(patch_layer="unet", patch_size=1, unet_block_out_channels=[8], unet_layers_per_block=2)
    patch_in, patch_out = build_patch_layers(config)
    patches, skips = patch_in(torch.randn(1, 3, 3, 5), torch.tensor([5]))
    assert patch_out(patches, torch.tensor([5]), skips, (3, 5)).shape == (1, 3, 3, 5)


def test_grid_sinusoids_tell_row_and_column_apart():
    table = grid_sinusoids(12, 3, 5, torch.device("cpu")).unflatten(0, (3, 5))
    assert len({tuple(vector.tolist()) for vector in table.flatten(0, 1)}) == 15
    first, second = table[..., :6], table[..., 6:]
    by_column, by_row = (first, second) if torch.equal(first[0], first[1]) else (second, first)
    assert all(torch.equal(by_column[0], by_column[row]) for row in range(3))
    assert all(torch.equal(by_row[:, 0], by_row[:, column]) for column in range(5))


def test_grid_positions_differ_by_place_and_running_ones_do_not(make_config):
    latents, times = torch.ones(1, 3, 12, 12), torch.tensor([0])
    for positions, num_distinct in (("grid", 36), ("running", 1)):
        patch_in, _ = build_patch_layers(make_config(patch_positions=positions))
        with torch.no_grad():
            patches = patch_in(latents, times)[0][0]
        assert len(patches.mul(1e4).round().unique(dim=0)) == num_distinct
