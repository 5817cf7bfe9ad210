import pytest
import torch

from hf_mm.demo.drawing import MAX_PREVIEWS, choose_seeds, draw


@pytest.mark.parametrize(("family", "options"), [("transfusion", {"num_inference_steps": 11}), ("cm3leon", {})])
def test_pictures_on_the_way_come_before_those_that_the_pipeline_draws(family, options, request):
    pipe, seeds = request.getfixturevalue(family), [3, 4]
    *before, last = draw(pipe, "a red star", seeds, **options)
    assert 1 <= len(before) <= MAX_PREVIEWS
    steps = [progress.step for progress in before]
    assert steps == sorted(set(steps)) and steps[-1] < last.num_steps == pipe.num_timesteps
    assert not any(progress.is_finished for progress in before) and last.is_finished
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    alone = pipe("a red star", num_images_per_prompt=2, generator=generators, **options).images
    assert [picture.tobytes() for picture in last.pictures] == [picture.tobytes() for picture in alone]
    assert before[0].pictures[0].tobytes() != last.pictures[0].tobytes()
    assert all(len(progress.pictures) == 2 and progress.seeds == seeds for progress in [*before, last])


def test_a_drawing_that_nobody_waits_for_stops(transfusion):
    drawing = draw(transfusion, "a red star", [3], num_inference_steps=97)
    next(drawing)
    drawing.close()  # returns when the thread has ended
    assert transfusion.interrupt


def test_what_a_pipeline_refuses_is_raised_where_the_drawing_was_asked_for(transfusion):
    with pytest.raises(ValueError, match="special token '<boi>'"):
        list(draw(transfusion, "a <boi>", [3]))
    with pytest.raises(ValueError, match="`height`=5"):
        list(draw(transfusion, "a star", [3], height=5))


def test_seeds_follow_the_first_and_are_new_where_none_is_given():
    assert choose_seeds(7, 3) == [7, 8, 9]
    assert choose_seeds(0, 1) == [0]
    assert choose_seeds(None, 1) != choose_seeds(None, 1)
    with pytest.raises(ValueError, match="The seed is -1"):
        choose_seeds(-1, 2)
