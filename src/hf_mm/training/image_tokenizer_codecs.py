"""The image tokenizers that can be trained: each reconstructs images and says what its latents cost.

Knows the forward contracts of diffusers' autoencoders. Does not know the other parts of the loss, nor the data.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.image_processor import VaeImageProcessor
from torch import distributed, nn

from .samples import save_captioned_grid


# Distances to codes taken at a time on a CPU, 2 MiB, which its cache holds.
MAX_DISTANCES = 2**19


# Axes: N images, C channels, H W pixels, c latent channels, h w latent pixels, K codes.
class KLCodec(nn.Module):
    """Reconstructs images through an `AutoencoderKL`, with the noise of its posterior given from outside.

    Another kind of tokenizer takes part in training by a module with the same forward.

    Args:
        vae (`AutoencoderKL`): The tokenizer to train.
        noise_scale (`float`, defaults to 1.0): Share of the posterior's deviation that its samples are drawn with.

    """

    def __init__(self, vae: AutoencoderKL, noise_scale: float = 1.0) -> None:
        super().__init__()
        self.vae, self.noise_scale = vae, noise_scale

    def forward(self, pixel_values: torch.Tensor, latent_noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes, samples and decodes.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, C, H, W)`): In [-1, 1].
            latent_noise (`torch.FloatTensor` of shape `(N, c, h, w)`): Standard normal.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The reconstruction `(N, C, H, W)`, and the KL of each image `(N,)`,
            summed over its latent.

        """
        posterior = self.vae.encode(pixel_values).latent_dist
        reconstruction = self.vae.decode(posterior.mean + self.noise_scale * posterior.std * latent_noise).sample
        return reconstruction, posterior.kl()


class VQCodec(nn.Module):
    """Reconstructs images through a `VQModel`, and counts how often each code is used.

    The straight-through gradient goes to the encoder, the loss of the codebook to the codes. Counts are summed over
    all processes at once, so that they are saved with the weights and resumed, and are the same everywhere.

    Source: VQ-VAE (arXiv 1711.00937), Eq. 3. Differs: means over the latent instead of sums, as VQGAN (arXiv
    2012.09841) has it. The `VQModel` by itself puts the smaller weight on the codebook's term (`legacy` in diffusers).

    Args:
        vq (`VQModel`): The tokenizer to train.
        commitment_weight (`float`, defaults to 0.25): Weight of the commitment beside that of the codebook's term.
        local_codes (`bool`, defaults to `False`):
            Whether encoder and codes learn from the pixels under each code alone, which one linear layer must tell
            from it (L1, joined to the second loss), and the decoder from codes as they are. Otherwise encoders write
            about an object all around it, which small models of codes cannot read. Not in the papers; ours.

    Attributes:
        is_quantizing (`bool`): Set to False, it passes latents on as they are, which lets encoder and decoder find
            each other before there are codes.

    """

    code_counts: torch.Tensor

    def __init__(self, vq: VQModel, commitment_weight: float = 0.25, *, local_codes: bool = False) -> None:
        super().__init__()
        self.vq, self.commitment_weight, self.is_quantizing = vq, commitment_weight, True
        self.own_pixels: nn.Module | None = None
        if local_codes:
            stride = 2 ** (len(vq.config.block_out_channels) - 1)
            code_length, num_values = vq.quantize.embedding.weight.shape[1], vq.config.out_channels * stride**2
            self.own_pixels = nn.Sequential(nn.Conv2d(code_length, num_values, 1), nn.PixelShuffle(stride))
        self.register_buffer("code_counts", torch.zeros(vq.config.num_vq_embeddings, dtype=torch.long))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes, quantizes and decodes.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, C, H, W)`): In [-1, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The reconstruction `(N, C, H, W)`, and of each image `(N,)` the loss
            of the codebook and of the commitment to it, means over the latent and 0 where nothing is quantized, and
            with local codes of what they tell of their own pixels.

        """
        latents = self.vq.encode(pixel_values).latents.float()
        if not self.is_quantizing:
            return self._reconstruct(latents, latents.new_zeros(len(latents)), pixel_values)
        codes = find_codes(self.vq, latents)  # (N, h, w)
        if self.training:
            self._count(codes)
        entries = self.vq.quantize.embedding(codes).permute(0, 3, 1, 2)  # (N, c, h, w)
        codebook = (entries - latents.detach()).square()
        commitment = (entries.detach() - latents).square()
        quantized = latents + (entries - latents).detach()
        cost = (codebook + self.commitment_weight * commitment).mean(dim=(1, 2, 3))
        return self._reconstruct(quantized, cost, pixel_values)

    def _reconstruct(
        self, latents: torch.Tensor, cost: torch.Tensor, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes; local codes do not learn from it, but from their own pixels."""
        if self.own_pixels is None:
            return self._decode(latents), cost
        own = (self.own_pixels(latents) - pixel_values).abs().mean(dim=(1, 2, 3))
        return self._decode(latents.detach()), cost + own

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes without `vq.decode`, which would quantize again or, with `lookup_from_codebook`, take codes."""
        guide = latents if self.vq.config.norm_type == "spatial" else None
        return self.vq.decoder(self.vq.post_quant_conv(latents), guide)

    @torch.no_grad()
    def _count(self, codes: torch.Tensor) -> None:
        counts = torch.bincount(codes.flatten(), minlength=len(self.code_counts))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        self.code_counts += counts


def freeze_encoder(tokenizer: AutoencoderKL | VQModel) -> None:
    """Leaves only what comes after latents, or codes, to be trained.

    Args:
        tokenizer (`AutoencoderKL` or `VQModel`): Whose pictures then stay encoded as they are.

    Source: the decoders that Stability AI trained further for Stable Diffusion's latents (`sd-vae-ft-mse`).
    """
    tokenizer.requires_grad_(False)
    for part in (tokenizer.decoder, tokenizer.post_quant_conv):
        if part is not None:
            part.requires_grad_(True)


@torch.no_grad()
def find_codes(vq: VQModel, latents: torch.Tensor) -> torch.Tensor:
    """Finds the nearest code of each latent pixel, as `vq.quantize` does, in a quarter of its time on a CPU.

    Squared distances less what a latent pixel adds to all of them are one product of matrices.

    Args:
        vq (`VQModel`): The tokenizer.
        latents (`torch.FloatTensor` of shape `(N, c, h, w)`): From `vq.encode`.

    Returns:
        `torch.LongTensor` of shape `(N, h, w)`: Numbers of codes.

    """
    num_images, channels, height, width = latents.shape
    entries = vq.quantize.embedding.weight
    flat = latents.movedim(1, -1).reshape(-1, channels).to(entries.dtype)
    parts = flat.split(max(1, MAX_DISTANCES // len(entries))) if flat.device.type == "cpu" else [flat]
    with torch.autocast(flat.device.type, enabled=False):
        norms = entries.square().sum(1)
        nearest = [torch.addmm(norms, part, entries.T, alpha=-2).min(1).indices for part in parts]
    return torch.cat(nearest).view(num_images, height, width)


@torch.no_grad()
def measure_latent_scale(vae: AutoencoderKL, images: Iterable[torch.Tensor]) -> float:
    """Measures the factor that gives latents a standard deviation of 1, as sampled from the posterior.

    Args:
        vae (`AutoencoderKL`): The trained tokenizer.
        images (`Iterable[torch.FloatTensor]` of shape `(N, 3, H, W)`): Batches in [-1, 1].

    Returns:
        `float`: For `config.scaling_factor`.

    Raises:
        ValueError: If there is no image, or the latents are constant.

    """
    count, total, total_of_squares = 0, 0.0, 0.0
    for pixel_values in images:
        posterior = vae.encode(pixel_values).latent_dist
        count += posterior.mean.numel()
        total += posterior.mean.double().sum().item()
        # The noise of the posterior is independent of its mean, so its variance adds to that of the means.
        total_of_squares += (posterior.mean.double().square() + posterior.var.double()).sum().item()
    variance = total_of_squares / count - (total / count) ** 2 if count else 0.0
    if not variance > 0:
        raise ValueError(f"`images` gave {count} latent values of variance {variance}. Give at least one real image.")
    return variance**-0.5


@torch.no_grad()
def save_reconstructions(tokenizer: AutoencoderKL | VQModel, images: torch.Tensor, path: str | Path) -> None:
    """Saves pictures, each beside what the tokenizer makes of it.

    Args:
        tokenizer (`AutoencoderKL` or `VQModel`): In evaluation mode afterwards.
        images (`torch.FloatTensor` of shape `(N, 3, H, W)`): In [-1, 1].
        path (`str` or `Path`): Where to.

    """
    images = images.to(tokenizer.device)
    encoded = tokenizer.eval().encode(images)
    latents = encoded.latent_dist.mode() if isinstance(tokenizer, AutoencoderKL) else encoded.latents
    ours = tokenizer.decode(latents).sample  # a VQModel quantizes in here
    pairs = torch.stack([images, ours], dim=1).flatten(0, 1).cpu()  # (2 N, 3, H, W), by turns
    shown = VaeImageProcessor(do_resize=False).postprocess(pairs)
    save_captioned_grid(shown, ["picture", "decoded"] * len(images), path)
