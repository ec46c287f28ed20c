"""Token states made elsewhere: read as they were written, and refused with the reason."""

import numpy as np
import pytest
import safetensors.numpy

from data_pipelines.encoders import text, text_states
from omnihuman_jax.errors import UserError


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    states = {"A person.": rng.normal(size=(3, 5)), "Someone speaks.": rng.normal(size=(4, 5)).astype(np.float16)}
    text_states.write(tmp_path / "states.safetensors", states)
    return tmp_path / "states.safetensors", states


def test_states_come_back_by_caption(file):
    path, states = file
    encoder = text.load(f"states:{path}")
    assert encoder.dim == 5 and text.load(encoder.name).name == encoder.name
    for caption, expected in states.items():
        np.testing.assert_array_equal(encoder.encode(caption), np.asarray(expected, np.float32))


def test_a_caption_that_is_not_in_the_file_is_named(file):
    with pytest.raises(UserError, match="has no states of 'Another'"):
        text.load(f"states:{file[0]}").encode("Another")


def test_a_file_of_another_form_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        text.load("states:nowhere.safetensors")
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"0": np.zeros((2, 3), np.float32)}, path)
    with pytest.raises(UserError, match="not a file of token states"):
        text.load(f"states:{path}")
    safetensors.numpy.save_file({"0": np.zeros(3, np.float32)}, path, metadata={"captions": '["A"]'})
    with pytest.raises(UserError, match="must be"):
        text.load(f"states:{path}")
