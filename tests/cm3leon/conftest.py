import pytest


@pytest.fixture(scope="session")
def make_config(make_cm3leon_config):
    return make_cm3leon_config


@pytest.fixture(scope="session")
def make_model(make_cm3leon):
    return make_cm3leon


@pytest.fixture(scope="session")
def make_processor(make_cm3leon_processor):
    return make_cm3leon_processor
