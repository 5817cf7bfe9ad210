import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hf_mm.transfusion.noise_transfusion import (
    NoiseProcess,
    build_scheduler,
    check_scheduler,
    sample_timesteps,
    set_timesteps,
)


def cosine_alpha_bars(num_timesteps):
    values, product = [], 1.0
    for index in range(num_timesteps):
        now, before = (
            math.cos((step / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in (index + 1, index)
        )
        product *= 1 - min(1 - now / before, 0.999)
        values.append(product)
    return torch.tensor(values)


@pytest.mark.parametrize("num_timesteps", [1000, 97])
def test_alphas_follow_the_cosine(make_config, num_timesteps):
    scheduler = build_scheduler(make_config(num_train_timesteps=num_timesteps))
    torch.testing.assert_close(scheduler.alphas_cumprod, cosine_alpha_bars(num_timesteps), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("time", [0, 250, 730, 999])
def test_noised_images_have_the_mean_and_variance_of_the_schedule(make_config, time):
    process = NoiseProcess(make_config())
    latents = torch.full((400, 3, 6, 10), 1.7)
    noised = process.add_noise(latents, torch.randn_like(latents), torch.full((400,), float(time)))
    alpha_bar = cosine_alpha_bars(1000)[time].item()
    tolerance = 5 / math.sqrt(latents.numel())
    assert noised.mean().item() == pytest.approx(1.7 * math.sqrt(alpha_bar), abs=tolerance)
    assert noised.var().item() == pytest.approx(1 - alpha_bar, abs=2 * tolerance)


def test_a_flow_runs_straight_from_image_to_noise(make_config):
    process = NoiseProcess(make_config(prediction_type="flow_prediction"))
    latents, noise = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6)
    times = torch.tensor([0.0, 250.5, 1000.0])
    share = (times / 1000)[:, None, None, None]
    noised = process.add_noise(latents, noise, times)
    torch.testing.assert_close(noised, (1 - share) * latents + share * noise)
    assert torch.equal(noised[0], latents[0])
    torch.testing.assert_close(process.target(latents, noise, times), noise - latents)


def test_velocity_and_noise_are_the_targets_of_their_prediction_types(make_config):
    latents, noise, times = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6), torch.tensor([3, 700])
    assert torch.equal(NoiseProcess(make_config()).target(latents, noise, times), noise)
    a = cosine_alpha_bars(1000)[times][:, None, None, None]
    velocity = NoiseProcess(make_config(prediction_type="v_prediction")).target(latents, noise, times)
    torch.testing.assert_close(velocity, a.sqrt() * noise - (1 - a).sqrt() * latents, rtol=1e-4, atol=1e-4)


def test_the_process_survives_being_built_without_memory(make_config):
    with torch.device("meta"):
        process = NoiseProcess(make_config())
    assert process.add_noise(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([0])).isfinite().all()


def test_timesteps_are_drawn_uniformly_over_all_indices():
    times = sample_timesteps(20000, num_train_timesteps=10, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(times.long(), minlength=10)
    assert torch.equal(times, times.floor()) and len(counts) == 10
    assert counts.min() > 1800 and counts.max() < 2200


def test_the_noise_cap_bounds_a_uniform_draw():
    times = sample_timesteps(5000, max_timestep=500, generator=torch.Generator().manual_seed(0))
    assert times.max() == 499 and times.min() == 0 and 240 < times.mean() < 260


def test_flow_times_are_real_and_may_crowd_the_middle():
    draw = {"prediction_type": "flow_prediction", "generator": torch.Generator().manual_seed(0)}
    uniform, middle = sample_timesteps(5000, **draw), sample_timesteps(5000, timestep_sampling="logit_normal", **draw)
    assert not torch.equal(uniform, uniform.floor()) and 0 <= uniform.min() and uniform.max() <= 1000
    assert abs((middle / 1000).logit().std() - 1) < 0.05 and middle.std() < uniform.std()


def test_the_same_generator_draws_the_same_timesteps_and_no_images_need_none():
    first, second = (sample_timesteps(7, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and sample_timesteps(0).shape == (0,)


@pytest.mark.parametrize("cap", [0, 1001, -3])
def test_a_cap_outside_the_noise_levels_is_refused(cap):
    with pytest.raises(ValueError, match=f"max_timestep.*{cap}"):
        sample_timesteps(3, max_timestep=cap)


def test_a_scheduler_that_reads_the_prediction_as_something_else_is_refused(make_config):
    noise, velocity, flow = (
        make_config(prediction_type=name) for name in ("epsilon", "v_prediction", "flow_prediction")
    )
    for kind in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        scheduler = kind.from_config(build_scheduler(noise).config)
        check_scheduler(scheduler, noise)
        for config in (velocity, flow):
            with pytest.raises(ValueError, match=f"{type(scheduler).__name__}.*'epsilon'.*{config.prediction_type}"):
                check_scheduler(scheduler, config)
    check_scheduler(FlowMatchEulerDiscreteScheduler(), flow)
    check_scheduler(DDIMScheduler.from_config(build_scheduler(velocity).config), velocity)
    for config in (noise, velocity):
        with pytest.raises(ValueError, match="'flow_prediction'"):
            check_scheduler(FlowMatchEulerDiscreteScheduler(), config)


def test_a_scheduler_with_other_noise_levels_is_refused(make_config):
    config = make_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="other noise levels.*from_config"):
        check_scheduler(DDIMScheduler(num_train_timesteps=config.num_train_timesteps), config)
    with pytest.raises(ValueError, match="other noise levels"):
        check_scheduler(DDIMScheduler(num_train_timesteps=17, beta_schedule="squaredcos_cap_v2"), config)


@pytest.mark.parametrize("num_steps", [25, 30, 250, 300, 600, 999, 1000])
def test_steps_of_any_number_start_near_full_noise_and_end_at_the_first_timestep(make_config, num_steps):
    scheduler = build_scheduler(make_config(prediction_type="epsilon"))
    set_timesteps(scheduler, num_steps, torch.device("cpu"))
    times = scheduler.timesteps.tolist()
    assert len(times) == num_steps and times[-1] == 0 and 1000 - times[0] in (1000 // num_steps, 1000 // num_steps + 1)
    assert {first - second for first, second in zip(times, times[1:], strict=False)} <= {
        1000 // num_steps,
        1000 // num_steps + 1,
    }
    if 1000 % num_steps == 0:
        expected = build_scheduler(make_config(prediction_type="epsilon"))
        expected.set_timesteps(num_steps)
        assert times == expected.timesteps.tolist()


def test_spacing_that_a_user_chose_stays(make_config):
    config = build_scheduler(make_config(prediction_type="epsilon")).config
    for kind, spacing in ((DDPMScheduler, "trailing"), (DDIMScheduler, "leading")):
        ours, theirs = (kind.from_config(config, timestep_spacing=spacing) for _ in range(2))
        set_timesteps(ours, 300, torch.device("cpu"))
        theirs.set_timesteps(300)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
