"""Latent images to transformer positions and back: the linear layers and the U-Net of Transfusion.

Knows images and hidden states, not sequences: where the patches stand among the text is the model's affair.
Every image of one call has the same size; the model groups images by size.
"""

# Axes: N images, C latent channels, H and W latent pixels, P patches per image, D hidden size, p patch side.

from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D, DownBlock2D, UpBlock2D
from torch import nn

from .configuration_transfusion import TransfusionConfig


NUM_SINUSOIDS = 256  # with an MLP of the hidden size behind it, this gives table 7's overhead of the linear layers
UNET_HEAD_DIM = 64


class TimestepEmbedder(nn.Module):
    """Embeds timesteps of shape `(N,)` as vectors of shape `(N, dim)`: sinusoids, then two linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sinusoids = Timesteps(NUM_SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(NUM_SINUSOIDS, dim)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Embeds `timesteps`."""
        return self.mlp(self.sinusoids(timesteps).to(self.mlp.linear_1.weight.dtype))


@lru_cache(maxsize=32)
def grid_sinusoids(dim: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Sinusoids of row and column, relative to the size of the grid, in raster order: `(height * width, dim)`."""
    return get_2d_sincos_pos_embed(dim, (height, width), device=device).float()


class GridEmbedder(nn.Module):
    """Tells each patch its row and column: sinusoids, then one linear layer that learns how loudly."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, dim, bias=False)

    def forward(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Adds its embedding to patches `(N, P, D)` of a grid `(height, width)`."""
        sinusoids = grid_sinusoids(patches.shape[-1], *grid, patches.device)
        return patches + self.projection(sinusoids.to(patches.dtype))


class NoGridEmbedder(nn.Module):
    """Leaves the place of a patch to the backbone's running positions, as the paper does."""

    def forward(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Returns `patches` as they are."""
        return patches


def build_grid_embedder(config: TransfusionConfig) -> nn.Module:
    """Builds the embedder that `config.patch_positions` asks for."""
    if config.patch_positions == "running":
        return NoGridEmbedder()
    return GridEmbedder(config.text_config.hidden_size)


class LinearPatchIn(nn.Module):
    """Projects each patch to the hidden size and adds the embedding of its image's timestep.

    Source: Transfusion, section 3. Differs: where the timestep is added is not printed; adding it at the hidden size
    after an MLP reproduces the parameter overhead of table 7.
    """

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.latent_channels * config.patch_size**2, hidden_size)
        self.timestep_embedder = TimestepEmbedder(hidden_size)
        self.grid_embedder = build_grid_embedder(config)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Turns noised latents `(N, C, H, W)` into patches `(N, P, D)`; the linear layers keep no skips."""
        squares = F.pixel_unshuffle(latents, self.patch_size)  # (N, C p p, H / p, W / p)
        patches = self.projection(squares.flatten(2).transpose(1, 2)) + self.timestep_embedder(timesteps)[:, None]
        return self.grid_embedder(patches, tuple(squares.shape[-2:])), ()


class LinearPatchOut(nn.Module):
    """Projects the hidden state of each patch to its share of the prediction."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.text_config.hidden_size, config.latent_channels * config.patch_size**2)

    def forward(
        self, hidden: torch.Tensor, timesteps: torch.Tensor, skips: tuple[torch.Tensor, ...], size: tuple[int, int]
    ) -> torch.Tensor:
        """Turns hidden states `(N, P, D)` into a prediction `(N, C, H, W)`, `size` being `(H, W)`."""
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        vectors = self.projection(hidden).transpose(1, 2).unflatten(2, grid)  # (N, C p p, H / p, W / p)
        return F.pixel_shuffle(vectors, self.patch_size)


class UNetPatchIn(nn.Module):
    """The way down: residual blocks that halve the image until one pixel is one patch, attending at the lowest level.

    Source: Transfusion, section 3 and table 7 (0.27B for both ways). Differs: the channel plan is ours; group norms
    without a scale from the timestep stand for the paper's plain LayerNorm.
    """

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        channels = config.unet_block_out_channels
        temb_channels = 4 * channels[0]
        common = {
            "temb_channels": temb_channels,
            "num_layers": config.unet_layers_per_block,
            "resnet_groups": config.unet_norm_num_groups,
        }
        self.timestep_embedder = TimestepEmbedder(temb_channels)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], kernel_size=3, padding=1)
        levels: list[nn.Module] = [
            DownBlock2D(in_channels=before, out_channels=width, add_downsample=True, **common)
            for before, width in zip([channels[0], *channels], channels[:-1], strict=False)
        ]
        levels.append(
            AttnDownBlock2D(
                in_channels=channels[max(len(channels) - 2, 0)],
                out_channels=channels[-1],
                attention_head_dim=min(UNET_HEAD_DIM, channels[-1]),
                downsample_type=None,
                **common,
            )
        )
        self.levels = nn.ModuleList(levels)
        self.projection = nn.Conv2d(channels[-1], config.text_config.hidden_size, kernel_size=1)
        self.grid_embedder = build_grid_embedder(config)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Turns noised latents `(N, C, H, W)` into patches `(N, P, D)` and the skips that the way up joins."""
        temb = self.timestep_embedder(timesteps)
        image = self.conv_in(latents)
        skips = (image,)
        for level in self.levels:
            image, outputs = level(image, temb)
            skips += outputs
        patches = self.projection(image).flatten(2).transpose(1, 2)
        return self.grid_embedder(patches, tuple(image.shape[-2:])), skips


class UNetPatchOut(nn.Module):
    """The way up: joins the skips of the way down, doubling the image back to the latent size."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        channels = config.unet_block_out_channels
        temb_channels = 4 * channels[0]
        common = {
            "temb_channels": temb_channels,
            "num_layers": config.unet_layers_per_block + 1,
            "resnet_groups": config.unet_norm_num_groups,
        }
        self.timestep_embedder = TimestepEmbedder(temb_channels)
        self.projection = nn.Conv2d(config.text_config.hidden_size, channels[-1], kernel_size=1)
        lowest, above = channels[-1], channels[-2] if len(channels) > 1 else channels[-1]
        levels: list[nn.Module] = [
            AttnUpBlock2D(
                in_channels=above,
                prev_output_channel=lowest,
                out_channels=lowest,
                attention_head_dim=min(UNET_HEAD_DIM, lowest),
                upsample_type="conv" if len(channels) > 1 else None,
                **common,
            )
        ]
        for index in reversed(range(len(channels) - 1)):
            levels.append(
                UpBlock2D(
                    in_channels=channels[max(index - 1, 0)],
                    prev_output_channel=channels[index + 1],
                    out_channels=channels[index],
                    add_upsample=index > 0,
                    **common,
                )
            )
        self.levels = nn.ModuleList(levels)
        self.norm = nn.GroupNorm(config.unet_norm_num_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.latent_channels, kernel_size=3, padding=1)
        self.skips_per_level = config.unet_layers_per_block + 1

    def forward(
        self, hidden: torch.Tensor, timesteps: torch.Tensor, skips: tuple[torch.Tensor, ...], size: tuple[int, int]
    ) -> torch.Tensor:
        """Turns hidden states `(N, P, D)` into a prediction `(N, C, H, W)`, `size` being `(H, W)`."""
        temb = self.timestep_embedder(timesteps)
        grid = skips[-1].shape[-2:]
        image = self.projection(hidden.transpose(1, 2).unflatten(2, grid))
        for level in self.levels:
            skips, joined = skips[: -self.skips_per_level], skips[-self.skips_per_level :]
            image = level(image, joined, temb)
        return self.conv_out(F.silu(self.norm(image)))


def build_patch_layers(config: TransfusionConfig) -> tuple[nn.Module, nn.Module]:
    """Builds the layers that bring images in and out, `config.patch_layer` naming the kind."""
    if config.patch_layer == "unet":
        return UNetPatchIn(config), UNetPatchOut(config)
    return LinearPatchIn(config), LinearPatchOut(config)
