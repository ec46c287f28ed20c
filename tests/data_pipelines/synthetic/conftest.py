"""The renderer's body model and speech engine, fetched by digest; tests that need them skip without."""

import pytest

from data_pipelines.raw import fetch
from data_pipelines.synthetic import body as body_lib
from data_pipelines.synthetic import speech


@pytest.fixture(scope="module")
def body():
    try:
        return body_lib.load()
    except fetch.PackageUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine():
    try:
        return speech.find_engine()
    except fetch.PackageUnavailableError as error:
        pytest.skip(str(error))
