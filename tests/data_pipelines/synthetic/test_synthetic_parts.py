"""The parts of the renderer: speech and mouth shapes, seams, skeleton."""

import re
import time

import numpy as np
import pytest

from data_pipelines.raw import media
from data_pipelines.synthetic import appearance, clips, clothes, mesh_cut, motion, people, skeleton, speech, visemes
from data_pipelines.synthetic.sentences import (
    HELDOUT,
    HELDOUT_FRAMES,
    HELDOUT_WORDS,
    TRAIN,
    TRAIN_FRAMES,
    TRAIN_WORDS,
    sentences,
)
from omnihuman_jax.errors import UserError

VOICE = speech.Voice("en-us+f2", 150, 50, 50)


@pytest.fixture(scope="module")
def person(body):
    rng = np.random.default_rng(1)
    return people.build(body, appearance.draw(rng), rng)


def test_there_are_enough_sentences_and_none_is_in_both_lists():
    assert len(set(TRAIN)) == len(TRAIN) >= 2000 and len(set(HELDOUT)) == len(HELDOUT) >= 200
    assert not set(TRAIN) & set(HELDOUT)


def words_of(texts):
    return set(re.findall(r"[a-z']+", " ".join(texts).lower()))


FUNCTION_WORDS = set("a an and as at away by have i in it my not of off or that the to up was you".split())


def test_held_out_sentences_have_content_words_and_patterns_of_their_own():
    assert len(words_of(TRAIN)) > 400 and len(words_of(HELDOUT)) > 100
    assert words_of(TRAIN) & words_of(HELDOUT) <= FUNCTION_WORDS
    assert not set(TRAIN_FRAMES) & set(HELDOUT_FRAMES)


@pytest.mark.parametrize(
    ("made", "frames", "words"), [(TRAIN, TRAIN_FRAMES, TRAIN_WORDS), (HELDOUT, HELDOUT_FRAMES, HELDOUT_WORDS)]
)
def test_every_pattern_and_word_is_used_and_the_nth_sentence_depends_on_n_alone(made, frames, words):
    everything = " ".join(made).lower()
    assert all(word.lower() in everything for entries in words.values() for word in entries)
    patterns = [re.sub(r"\\{\w\\}", ".+", re.escape(frame)) for frame in frames]
    assert all(any(re.fullmatch(pattern, text, re.IGNORECASE) for text in made) for pattern in patterns)
    assert not any("{" in text or "  " in text or text[0].islower() for text in made)
    assert sentences(50, frames, words) == made[:50]


def test_most_training_sentences_close_the_lips_and_bite_the_lower_lip_or_round_them():
    closed = np.mean([bool(re.search("[pbm]", text.lower())) for text in TRAIN])
    other = np.mean([bool(re.search("[fvw]|oo", text.lower())) for text in TRAIN])
    assert closed > 0.97 and other > 0.9


@pytest.mark.parametrize("accent", sorted(set(speech.ACCENTS)))
def test_every_sound_of_every_sentence_has_a_mouth_shape(engine, accent):
    some = TRAIN[::60] + HELDOUT[::20] + tuple(sorted(words_of(TRAIN + HELDOUT)))
    said = speech.speak(engine, " ".join(some), speech.Voice(accent, 170, 50, 50))
    assert said.seconds > 200
    assert all(visemes.shapes_of(symbol) for symbol in said.symbols)


def test_an_unknown_sound_and_an_unknown_voice_are_errors(engine):
    with pytest.raises(ValueError, match="no mouth shape"):
        visemes.shapes_of("☃")
    with pytest.raises(UserError, match="no voice"):
        speech.speak(engine, "Hello.", speech.Voice("nobody", 150, 50, 50))


def test_speech_is_the_same_every_time(engine):
    one = speech.speak(engine, TRAIN[0], VOICE)
    time.sleep(1.1)  # the library seeds its noise with the second of the day
    other = speech.speak(engine, TRAIN[0], VOICE)
    np.testing.assert_array_equal(one.wave, other.wave)
    assert one.symbols == other.symbols


def test_lips_close_for_p_b_m_and_open_for_wide_vowels(engine):
    said = speech.speak(engine, "A papa may hum above the palm, and bob among my apples.", VOICE)
    ends = np.append(said.starts[1:], said.seconds)
    middles = (said.starts + ends) / 2
    jaw = visemes.face_units(visemes.articulate(said, middles))["jawOpen"]
    closed = np.array([visemes.shapes_of(s)[0] == "pbm" for s in said.symbols])
    wide = np.array([visemes.shapes_of(s)[0] in ("aa", "ae") for s in said.symbols])
    assert closed.sum() > 8 and wide.sum() > 3
    assert np.median(jaw[closed]) < 0.1 < 0.45 < np.median(jaw[wide])


def test_the_mouth_follows_the_sound_in_time(engine):
    said = speech.speak(engine, " ".join(TRAIN[:6]), VOICE)
    times = np.arange(0.5, said.seconds * 25 - 1) / 25
    opening = visemes.articulate(said, times)[:, 0]
    step = speech.SAMPLE_RATE // 25
    loud = np.array([np.sqrt(np.mean(said.wave[i * step : (i + 1) * step] ** 2)) for i in range(len(times))])
    by_lag = {lag: np.corrcoef(opening[6:-6], np.roll(loud, lag)[6:-6])[0, 1] for lag in range(-5, 6)}
    assert max(by_lag, key=by_lag.get) in (-1, 0, 1)
    assert by_lag[0] > 0.35


def test_the_sound_of_a_clip_starts_with_its_picture(engine, tmp_path):
    said = speech.speak(engine, TRAIN[1], VOICE)
    for first in (-4, 7):
        sound = clips._cut(said, first, 25)
        assert sound.shape == (speech.SAMPLE_RATE,)
        source = np.pad(said.wave, (4 * 640, speech.SAMPLE_RATE))
        np.testing.assert_array_equal(sound, source[(first + 4) * 640 :][: len(sound)])
    path = tmp_path / "clip.mp4"
    media.write_mp4(path, np.zeros((25, 32, 32, 3), np.uint8), audio=sound)
    heard = media.read_audio(path, end=1.0)
    lags = np.arange(-200, 201)
    match = [np.dot(heard[300:-300], sound[300 + lag : len(sound) - 300 + lag]) for lag in lags]
    assert abs(lags[int(np.argmax(match))]) <= 2


def test_resampling_keeps_a_tone_in_place():
    wave = np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    out = speech.resample(wave, 22050, 16000)
    assert len(out) == 16000
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(out[200:-200], expected[200:-200], atol=2e-3)


def area(body):
    return np.linalg.norm(people.quad_normals(body.vertices, body.quads).astype(np.float64), axis=1) / 2


def test_seams_split_quads_without_changing_the_surface(body):
    field = body.vertices[:, 1] - clothes.WAIST
    cut = mesh_cut.cut(body, field, np.ones(len(body.quads), bool))
    assert len(cut.quads) > len(body.quads)
    values = (cut.vertices[:, 1] - clothes.WAIST)[cut.quads]
    mixed = (values > 1e-4).any(1) & (values < -1e-4).any(1)
    assert mixed.sum() <= 2
    assert area(cut).sum() == pytest.approx(area(body).sum(), rel=1e-3)
    np.testing.assert_allclose(cut.weights.sum(1), 1, atol=1e-4)
    assert cut.face_units.shape[1] == len(cut.face_vertices)


def test_a_person_at_rest_stays_where_the_mesh_is(person):
    points, joints = skeleton.skin(person, person.rest[None], {}, np.zeros((1, 3)))
    np.testing.assert_allclose(points[0], person.rest, atol=2e-4)
    np.testing.assert_allclose(joints[0, :, 0], person.heads, atol=1e-6)


@pytest.mark.parametrize("side", ["l", "r"])
def test_arms_reach_for_the_wanted_place_and_keep_their_length(person, side):
    places = np.array(list(motion.HANDS.values())) * [1 if side == "l" else -1, 1, 1]
    turns = skeleton.reach(person, side, places, np.array([1 if side == "l" else -1, -0.5, -0.4]))
    frames = len(places)
    still = np.repeat(person.rest[None], frames, 0)
    joints = skeleton.skin(person, still, turns, np.zeros((frames, 3)))[1][:, :, 0]
    shoulder, elbow, wrist = (joints[:, person.bones.index(f"{b}_{side}")] for b in ("upperarm", "lowerarm", "hand"))
    upper, lower = (np.linalg.norm(d, axis=1) for d in (elbow - shoulder, wrist - elbow))
    np.testing.assert_allclose(upper, upper[0], rtol=1e-5)
    np.testing.assert_allclose(lower, lower[0], rtol=1e-5)
    reached = (wrist - shoulder) / (upper + lower)[:, None]
    within = np.linalg.norm(places, axis=1) < 0.99
    np.testing.assert_allclose(reached[within], places[within], atol=1e-4)


def test_head_turns_move_the_nose_and_not_the_hips(person):
    turn = {"head": skeleton.euler(np.array([0.0]), np.array([0.3]), np.array([0.0]))}
    points, joints = skeleton.skin(person, person.rest[None], turn, np.zeros((1, 3)))
    nose = person.landmarks["nose"]
    assert points[0, nose, 0] > person.rest[nose, 0] + 0.2  # towards the person's left, which is +x
    np.testing.assert_allclose(joints[0, person.bones.index("thigh_l"), 0], person.heads[person.bones.index("thigh_l")])


def test_blinks_close_both_eyes_together_and_leave_them_open_mostly():
    rng = np.random.default_rng(0)
    closed = motion.blinks(rng, np.arange(1000) / 25)
    assert closed.max() == 1 and (closed == 0).mean() > 0.8
