"""The noise of Transfusion: what a training image becomes at a timestep, what is predicted, which schedulers draw.

Timesteps are diffusers' indices, `0` the least noisy, which is the paper's `t` minus 1; for `flow_prediction` they are
real numbers in `[0, num_train_timesteps]`, the share of noise being `timestep / num_train_timesteps`. A clean image
(one given as context, or written after drawing) carries `CLEAN_TIMESTEP` and no noise, in training and in sampling
alike; for the DDPM schedule that index holds noise of standard deviation 0.006, which the model cannot tell from none.
"""

# Axes: N images, C latent channels, H and W latent pixels.

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .configuration_transfusion import TransfusionConfig


CLEAN_TIMESTEP = 0


def build_scheduler(config: TransfusionConfig) -> SchedulerMixin:
    """Builds the scheduler that fits `config.prediction_type`, for training targets and as the default for drawing.

    Returns:
        `SchedulerMixin`: `FlowMatchEulerDiscreteScheduler` for `flow_prediction`; otherwise `DDPMScheduler` with the
        cosine schedule, the posterior variance, leading spacing and no clipping (diffusers' own defaults are linear
        betas and clipping; trailing or linspace spacing multiply the error of the first step by 126 at 250 steps).

    Source: Transfusion, section 2.2 (cosine schedule) and 3 (250 of 1000 steps). Differs: variance and spacing are
    ours.
    """
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=config.prediction_type,
        variance_type="fixed_small",
        timestep_spacing="leading",
        clip_sample=False,
    )


def check_scheduler(scheduler: SchedulerMixin, config: TransfusionConfig) -> None:
    """Refuses a scheduler that reads the model's prediction as something else.

    Raises:
        ValueError: If the scheduler's prediction type or its noise levels are not those the model was trained with.
    """
    wants = scheduler.config.get("prediction_type")
    if wants is None and type(scheduler).__name__.startswith("FlowMatch"):
        wants = "flow_prediction"
    if wants != config.prediction_type:
        fitting = (
            "a FlowMatch scheduler" if config.prediction_type == "flow_prediction" else "DDPM, DDIM or DPM-Solver"
        )
        raise ValueError(
            f"`scheduler`={type(scheduler).__name__} expects `prediction_type`={wants!r}, but this model predicts "
            f"{config.prediction_type!r}. Use {fitting} with that `prediction_type`."
        )
    if config.prediction_type != "flow_prediction":
        trained, given = build_scheduler(config).alphas_cumprod, scheduler.alphas_cumprod.cpu()
        if given.shape != trained.shape or not torch.allclose(given, trained, atol=1e-4):
            raise ValueError(
                f"`scheduler`={type(scheduler).__name__} has other noise levels than the model was trained with. "
                f"Build it as `{type(scheduler).__name__}.from_config(pipe.scheduler.config)`."
            )


def set_timesteps(scheduler: SchedulerMixin, num_steps: int, device: torch.device) -> None:
    """Sets the timesteps of a drawing: the scheduler's own, but evenly spread for DDPM with leading spacing.

    diffusers rounds the stride down, so that 600 of 1000 steps would start at timestep 599, where a third of the
    variance should be image already, though drawing starts from noise alone. Here the stride is not rounded; where it
    is whole nothing differs.

    Args:
        scheduler (`SchedulerMixin`): Set in place.
        num_steps (`int`): Denoising steps.
        device (`torch.device`): Where the timesteps go.
    """
    total = scheduler.config.num_train_timesteps
    if (
        not isinstance(scheduler, DDPMScheduler)
        or scheduler.config.timestep_spacing != "leading"
        or not total % num_steps
    ):
        scheduler.set_timesteps(num_steps, device=device)
        return
    kept = [number * total // num_steps + scheduler.config.steps_offset for number in reversed(range(num_steps))]
    scheduler.set_timesteps(timesteps=kept, device=device)


def sample_timesteps(
    num_images: int,
    *,
    prediction_type: str = "epsilon",
    timestep_sampling: str = "uniform",
    num_train_timesteps: int = 1000,
    max_timestep: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws one training timestep per image.

    Args:
        num_images (`int`): How many to draw.
        prediction_type (`str`): As in the configuration; flows take real times, the others indices.
        timestep_sampling (`str`): `"uniform"` or `"logit_normal"`.
        num_train_timesteps (`int`): Number of noise levels.
        max_timestep (`int`, *optional*): Noise cap: timesteps lie below it. 500 is the paper's `t <= 500`.
        generator (`torch.Generator`, *optional*): Source of the randomness.

    Returns:
        `torch.FloatTensor` of shape `(num_images,)`, whole numbers unless `prediction_type` is `flow_prediction`.

    Raises:
        ValueError: If the cap lies outside the noise levels.

    Source: Transfusion, section 3 and table 8. Differs: the paper does not state the law; uniform is the default.
    """
    limit = num_train_timesteps if max_timestep is None else max_timestep
    if not 1 <= limit <= num_train_timesteps:
        raise ValueError(f"`max_timestep`={max_timestep} must lie between 1 and {num_train_timesteps}.")
    if timestep_sampling == "logit_normal":
        share = torch.sigmoid(torch.randn(num_images, generator=generator))
    else:
        share = torch.rand(num_images, generator=generator)
    timesteps = share * limit
    return timesteps if prediction_type == "flow_prediction" else timesteps.floor().clamp(max=limit - 1)


class NoiseProcess:
    """Noises images for training and says what the model should have predicted.

    Args:
        config (`TransfusionConfig`): Names the prediction type and the number of timesteps.
    """

    def __init__(self, config: TransfusionConfig) -> None:
        with torch.device("cpu"):  # loading builds models on the meta device, where the schedule would be lost
            self.scheduler = build_scheduler(config)
        self.num_train_timesteps = config.num_train_timesteps
        self.is_flow = config.prediction_type == "flow_prediction"
        self.predicts_noise = config.prediction_type == "epsilon"

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mixes images `(N, C, H, W)` with noise of the same shape at timesteps `(N,)`."""
        if self.is_flow:
            share = (timesteps / self.num_train_timesteps).to(latents.dtype)[:, None, None, None]
            return torch.lerp(latents, noise, share)
        return self.scheduler.add_noise(latents, noise, timesteps.long())

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns what the model should predict for the image that `add_noise` made of the same arguments."""
        if self.predicts_noise:
            return noise
        if self.is_flow:
            return noise - latents
        return self.scheduler.get_velocity(latents, noise, timesteps.long())
