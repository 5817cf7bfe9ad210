import pytest
from PIL import Image

import sample


def draw(model, output, **fields):
    words = ["--model_name_or_path", str(model), "--output", str(output), "--prompts", "a red star", "kite"]
    for name, value in fields.items():
        words += [f"--{name}", *map(str, value)]
    with Image.open(sample.main(words)) as grid:
        return grid.size


def test_a_grid_has_a_row_for_each_setting(run, codes, tmp_path):
    model = run("latents", max_steps=1)
    one = draw(model, tmp_path / "one.png", guidance_scales=[2], num_inference_steps=[2])
    more = {
        "guidance_scales": [1, 2],
        "num_inference_steps": [2, 3],
        "schedulers": ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"],
    }
    width, height = draw(model, tmp_path / "grid.png", **more)
    assert width == one[0] and height > 7 * one[1]
    model = run("codes", max_steps=1, **codes)
    width, height = draw(model, tmp_path / "codes.png", guidance_scales=[1, 2])
    assert height > one[1]
    with pytest.raises(ValueError, match="`schedulers`=.*CM3LeonPipeline has none"):
        draw(model, tmp_path / "none.png", schedulers=["DDIMScheduler"])
    with pytest.raises(ValueError, match="'Nonsense' is no scheduler of diffusers"):
        draw(model, tmp_path / "none.png", schedulers=["Nonsense"])
    assert not (tmp_path / "none.png").exists()
