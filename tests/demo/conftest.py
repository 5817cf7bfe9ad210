"""Pipelines that the demo shows: a small checkpoint that ships, and a random CM3Leon."""

import pytest
from diffusers import DiffusionPipeline

import hf_mm
from hf_mm import CM3LeonPipeline


@pytest.fixture(scope="package")
def transfusion():
    pipe = DiffusionPipeline.from_pretrained(hf_mm.CHECKPOINTS / "transfusion-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cm3leon(make_cm3leon, make_cm3leon_processor):
    model = make_cm3leon()
    pipe = CM3LeonPipeline(model, make_cm3leon_processor(model.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe
