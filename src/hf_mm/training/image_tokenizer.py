"""What an image tokenizer is trained on: reconstruction, a regular latent, features and a patch discriminator.

Knows what a codec returns, see `image_tokenizer_codecs`. Does not know which tokenizer that is, nor the data.

Generator and discriminator are trained by one loss with one backward pass: the discriminator's loss sees detached
reconstructions, and the generator's loss sees the discriminator with detached weights. So each loss reaches only its
own parameters, one optimizer serves both, and the training loop needs to know nothing of two players.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import ModelOutput


# Axes: N images, C channels, H W pixels, h w latent pixels.
LOSS_PARTS = (
    "reconstruction_loss", "latent_loss", "perceptual_loss", "identity_loss", "generator_loss", "discriminator_loss",
)  # fmt: skip


@dataclass
class ImageTokenizerOutput(ModelOutput):
    """The weighted loss and its unweighted parts; a part is None where it is switched off.

    Args:
        loss (`torch.FloatTensor` of shape `()`): What is minimised.
        reconstruction_loss (`torch.FloatTensor` of shape `()`): Mean absolute error over pixels in [-1, 1].
        latent_loss (`torch.FloatTensor` of shape `()`): What the codec asks of a latent image: the KL to the unit
            normal in nats, or the losses of the codebook.
        perceptual_loss (`torch.FloatTensor` of shape `()`): Distance of the perceptual network's features.
        identity_loss (`torch.FloatTensor` of shape `()`): Distance of the identity network's features.
        generator_loss (`torch.FloatTensor` of shape `()`): Minus the discriminator's mean score of reconstructions.
        discriminator_loss (`torch.FloatTensor` of shape `()`): Hinge loss of the discriminator.

    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    latent_loss: torch.Tensor | None = None
    perceptual_loss: torch.Tensor | None = None
    identity_loss: torch.Tensor | None = None
    generator_loss: torch.Tensor | None = None
    discriminator_loss: torch.Tensor | None = None


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches of an image as real (high) or reconstructed (low).

    Source: VQGAN (arXiv 2012.09841), after pix2pix (arXiv 1611.07004). Differs: group norm instead of batch norm, so
    that the score of an image does not depend on the others of its micro-batch.

    Args:
        num_channels (`int`): Width of the first layer, a multiple of 8; doubles with each layer, at most eightfold.
        num_layers (`int`): Layers with stride 2.

    """

    def __init__(self, num_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, num_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = num_channels
        for number in range(1, num_layers + 1):
            wider = num_channels * min(2**number, 8)
            stride = 2 if number < num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, stride=1, padding=1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scores `(N, 3, H, W)` pixels in [-1, 1] as `(N, 1, patches down, patches across)`."""
        return self.layers(pixel_values)


class FeatureDistance(nn.Module):
    """Distance of two images in the features of a frozen vision network.

    The channels of each stage are scaled to unit length, squared differences summed over channels, and averaged over
    places and stages: LPIPS without its learned weights.

    Source: LPIPS (arXiv 1801.03924), Eq. 1 with all weights 1.

    Args:
        backbone (`nn.Module`): Returns an object with `feature_maps`, as every transformers backbone does.

    """

    image_mean: torch.Tensor
    image_std: torch.Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.register_buffer("image_mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "FeatureDistance":
        """Stays in evaluation mode: the network is a fixed ruler."""
        return super().train(False)

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compares `(N, 3, H, W)` with `(N, 3, H, W)`, both in [-1, 1]; one number per image, `(N,)`."""
        distances = []
        for ours, real in zip(self._features(reconstruction), self._features(pixel_values), strict=True):
            distances.append((ours - real).square().sum(dim=1).mean(dim=(1, 2)))
        return torch.stack(distances).mean(dim=0)

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        pixels = ((images + 1) / 2 - self.image_mean) / self.image_std
        return [F.normalize(stage, dim=1) for stage in self.backbone(pixels).feature_maps]


def load_feature_distance(name_or_path: str) -> FeatureDistance:
    """Loads a vision network of transformers as a ruler: every stage of a backbone, from safetensors only.

    This door runs no code of the repository and opens no pickle. Other networks, such as the original LPIPS, are given
    to `ImageTokenizerTrainer` as modules.

    Args:
        name_or_path (`str`): Hub id or folder of a checkpoint that transformers has a backbone for, such as a ResNet.

    Returns:
        `FeatureDistance`: With the features of all stages.

    Raises:
        ValueError: If transformers has no backbone of that kind.
        OSError: If there are no weights in safetensors.

    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise ValueError(
            f"{name_or_path} is a `{config.model_type}`, which transformers has no backbone for. Try a ResNet."
        )
    # Not through AutoBackbone.from_pretrained: it asks the Hub first, and so opens no local folder.
    backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    stages = list(range(1, len(config.stage_names)))  # stage 0 is the stem
    backbone = backbone_class.from_pretrained(name_or_path, use_safetensors=True, out_indices=stages)
    return FeatureDistance(backbone)


@dataclass
class ImageTokenizerWeights:
    """Weights of the parts of the loss.

    Source: Transfusion (arXiv 2408.11039), App. A: L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL. Differs: the paper does
    not say over what each part is summed. Here L1 is a mean over pixels and the KL a sum over the latent.
    """

    latent: float = 1e-6
    perceptual: float = 1.0
    identity: float = 0.2


class ImageTokenizerTrainer(nn.Module):
    """Turns a batch of images into the loss of a tokenizer and of its discriminator.

    Source: Transfusion (arXiv 2408.11039), App. A, after VQGAN (arXiv 2012.09841). Differs: the weight of the
    generator's loss is fixed, not adapted to the last layer's gradients, because an adapted weight would differ from
    micro-batch to micro-batch, and accumulation would no longer equal one big batch.

    Args:
        codec (`nn.Module`): Such as `KLCodec` or `VQCodec`.
        discriminator (`nn.Module`): Such as `PatchDiscriminator`.
        weights (`ImageTokenizerWeights`): Of the parts other than the discriminator's.
        perceptual_distance (`nn.Module`, *optional*): Takes two batches of images in [-1, 1], returns `(N,)`.
        identity_distance (`nn.Module`, *optional*): The same.

    """

    def __init__(
        self,
        codec: nn.Module,
        discriminator: nn.Module,
        weights: ImageTokenizerWeights,
        *,
        perceptual_distance: nn.Module | None = None,
        identity_distance: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.codec, self.discriminator, self.weights = codec, discriminator, weights
        self.perceptual_distance, self.identity_distance = perceptual_distance, identity_distance

    @staticmethod
    def count_targets(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Counts the images of a batch."""
        return {"num_images_in_batch": torch.tensor(len(batch["pixel_values"]))}

    def forward(
        self,
        pixel_values: torch.Tensor,
        latent_noise: torch.Tensor | None = None,
        num_images_in_batch: torch.Tensor | None = None,
        adversarial_weight: torch.Tensor | None = None,
    ) -> ImageTokenizerOutput:
        """Computes the loss of both players.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, 3, H, W)`): In [-1, 1].
            latent_noise (`torch.FloatTensor` of shape `(N, c, h, w)`, *optional*): Standard normal, for a codec that
                samples its latents.
            num_images_in_batch (`torch.IntTensor` of shape `()`, *optional*): Images of the whole step; N by default.
            adversarial_weight (`torch.FloatTensor` of shape `()`, *optional*): Weight of the generator's loss. Without
                it the discriminator neither judges nor learns.

        Returns:
            `ImageTokenizerOutput`.

        """
        num_images = len(pixel_values) if num_images_in_batch is None else num_images_in_batch
        noise = () if latent_noise is None else (latent_noise,)
        reconstruction, latent_loss = self.codec(pixel_values, *noise)
        reconstruction_loss = (reconstruction - pixel_values).abs().mean(dim=(1, 2, 3)).sum() / num_images
        latent_loss = latent_loss.sum() / num_images
        output = ImageTokenizerOutput(reconstruction_loss=reconstruction_loss, latent_loss=latent_loss)
        loss = reconstruction_loss + self.weights.latent * latent_loss
        if self.perceptual_distance is not None:
            output.perceptual_loss = self.perceptual_distance(reconstruction, pixel_values).sum() / num_images
            loss = loss + self.weights.perceptual * output.perceptual_loss
        if self.identity_distance is not None:
            output.identity_loss = self.identity_distance(reconstruction, pixel_values).sum() / num_images
            loss = loss + self.weights.identity * output.identity_loss
        if adversarial_weight is not None:
            output.generator_loss = self._generator_loss(reconstruction).sum() / num_images
            output.discriminator_loss = self._discriminator_loss(reconstruction, pixel_values).sum() / num_images
            loss = loss + adversarial_weight * output.generator_loss + output.discriminator_loss
        output.loss = loss
        return output

    def _generator_loss(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """Rewards high scores, without a gradient to the discriminator's weights; one number per image, (N,)."""
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return -functional_call(self.discriminator, fixed, (reconstruction,)).mean(dim=(1, 2, 3))

    def _discriminator_loss(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Hinge loss, without a gradient to the reconstruction; one number per image, (N,)."""
        both = self.discriminator(torch.cat([pixel_values, reconstruction.detach()]))
        real, ours = both.chunk(2)
        return 0.5 * (F.relu(1 - real) + F.relu(1 + ours)).mean(dim=(1, 2, 3))
