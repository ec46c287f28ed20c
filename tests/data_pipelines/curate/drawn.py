"""Videos of a drawn person whose keypoints, mouth and speech are known exactly."""

import numpy as np

from data_pipelines import keypoints as kp
from data_pipelines.raw import media

SIZE = (144, 192)
# Fractions of the picture's height from its centre, of a person half a picture high from eyes to hips.
BODY = {
    "nose": (0, -0.2), "left_eye": (0.04, -0.25), "right_eye": (-0.04, -0.25), "left_ear": (0.08, -0.24),
    "right_ear": (-0.08, -0.24), "brow_left": (0.04, -0.28), "brow_right": (-0.04, -0.28), "chin": (0, -0.1),
    "mouth_left": (0.03, -0.15), "mouth_right": (-0.03, -0.15), "left_shoulder": (0.14, -0.02),
    "right_shoulder": (-0.14, -0.02), "left_elbow": (0.18, 0.15), "right_elbow": (-0.18, 0.15),
    "left_wrist": (0.16, 0.28), "right_wrist": (-0.16, 0.28), "left_hip": (0.09, 0.3), "right_hip": (-0.09, 0.3),
}  # fmt: skip

JOINTS = {f"{side}_{joint}" for side in ("left", "right") for joint in ("shoulder", "elbow", "wrist", "hip")}


def openings(count, seed=0):
    """(F,) opening of a mouth that speaks, 0..1, with pauses, different for each seed."""
    rng = np.random.default_rng(seed)
    found = np.zeros(count)
    at = 4
    while at < count - 8:
        length = int(rng.integers(4, 9))
        rise = np.sin(np.linspace(0, np.pi, length)) * rng.uniform(0.4, 1)
        found[at : at + length] = np.maximum(found[at : at + length], rise[: count - at])
        at += length + int(rng.integers(0, 4)) + (12 if rng.random() < 0.1 else 0)
    return found


def points(mouth, size=SIZE, hands=False, jitter=0.0, seed=0):
    """Keypoints (F,K,3) of the person with mouths (F,) open, who sways a little; `jitter`: noise of the body's."""
    height, width = size
    rng = np.random.default_rng(seed)
    found = np.zeros((len(mouth), kp.NUM_KEYPOINTS, 3), np.float32)
    sway = 0.02 * np.sin(np.arange(len(mouth)) / 9)
    places = {name: np.tile(place, (len(mouth), 1)).astype(float) for name, place in BODY.items()}
    places["mouth_top"] = np.stack([0 * mouth, -0.155 + 0 * mouth], 1)
    places["mouth_bottom"] = np.stack([0 * mouth, -0.153 + 0.03 * mouth], 1)
    if hands:
        for side, x in (("left", 0.16), ("right", -0.16)):
            places[f"{side}_index_tip"] = np.tile([x, 0.33], (len(mouth), 1))
            places[f"{side}_thumb_tip"] = np.tile([x * 0.8, 0.32], (len(mouth), 1))
    for name, place in places.items():
        moved = place + np.stack([sway, 0 * sway], 1) + rng.normal(0, jitter * (name in JOINTS), place.shape)
        found[:, kp.INDEX[name]] = np.stack([0.5 + moved[:, 0] * height / width, 0.5 + moved[:, 1], 0 * sway + 1], 1)
    return found


def frames(keypoints, size=SIZE, seed=0):
    """(F,H,W,3) uint8: a textured background, the head as a disc, the mouth as a dark ellipse, the body as a block."""
    import cv2

    height, width = size
    rng = np.random.default_rng(100 + seed)
    noise = rng.integers(40, 220, (height // 8, width // 8, 3)).astype(np.uint8)
    background = cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST)
    made = []
    for row in keypoints:
        at = {name: tuple(int(v) for v in row[i, :2] * [width, height]) for name, i in kp.INDEX.items()}
        image = background.copy()
        cv2.rectangle(image, at["right_shoulder"], at["left_hip"], (30, 60, 160), -1)
        cv2.circle(image, at["nose"], int(0.12 * height), (220, 180, 150), -1)
        for eye in ("left_eye", "right_eye"):
            cv2.circle(image, at[eye], max(1, height // 70), (20, 20, 20), -1)
        gap = max(1, at["mouth_bottom"][1] - at["mouth_top"][1])
        cv2.ellipse(image, at["mouth_top"], (int(0.03 * height), gap), 0, 0, 360, (90, 20, 20), -1)
        made.append(image)
    return np.stack(made)


def speech(mouth, late=0.0, seed=0):
    """(N,) sound at 16 kHz: noise in the band of speech, as loud as the mouth is open, `late` seconds behind."""
    rng = np.random.default_rng(200 + seed)
    count = len(mouth) * 640
    times = np.arange(count) / 640 - late * 25 - 0.5
    level = np.interp(times, np.arange(len(mouth)), mouth, left=0, right=0)
    buzz = np.sign(np.sin(2 * np.pi * 140 * np.arange(count) / 16000)) + rng.normal(0, 0.5, count)
    return (0.15 * level * buzz + 0.001 * rng.normal(0, 1, count)).astype(np.float32)


def write(
    folder, name, *, seconds=6.0, seed=0, late=0.0, sound=True, voice_of=None, size=SIZE, annotate=True, **options
):
    """Writes NAME.mp4 and NAME.npz with the truth; returns the manifest's entry. `voice_of`: another's seed."""
    count = round(seconds * 25)
    mouth = openings(count, seed)
    truth = points(mouth, size, seed=seed, **options)
    heard = mouth if voice_of is None else openings(count, voice_of)
    wave = speech(heard, late, seed) if sound else None
    media.write_mp4(folder / f"{name}.mp4", frames(truth, size, seed), audio=wave)
    if not annotate:
        return {"id": name, "file": f"{name}.mp4"}
    np.savez(folder / f"{name}.npz", keypoints=truth)
    return {"id": name, "file": f"{name}.mp4", "annotations": f"{name}.npz", "caption": f"A drawn person, {name}."}
