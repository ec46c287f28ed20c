"""Still backgrounds: walls, gradients, stripes, rooms and blurred shapes, with words for the caption."""

from __future__ import annotations

import cv2
import numpy as np

COLOURS = {
    "blue": (0.36, 0.50, 0.72),
    "green": (0.42, 0.60, 0.44),
    "grey": (0.60, 0.61, 0.63),
    "beige": (0.82, 0.76, 0.65),
    "red": (0.66, 0.32, 0.30),
    "purple": (0.52, 0.42, 0.62),
    "white": (0.88, 0.88, 0.87),
    "dark": (0.20, 0.21, 0.24),
    "yellow": (0.86, 0.78, 0.46),
    "turquoise": (0.36, 0.64, 0.66),
}
KINDS = ("wall", "gradient", "stripes", "room", "shapes", "window")


def _colour(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    name = list(COLOURS)[rng.integers(len(COLOURS))]
    return name, np.clip(np.array(COLOURS[name]) + rng.uniform(-0.05, 0.05, 3), 0.03, 0.97)


def draw(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str]:
    """A picture (H,W,3) float32 in 0..1 and its words for the caption, as "a blue wall"."""
    kind = KINDS[rng.integers(len(KINDS))]
    name, colour = _colour(rng)
    other = _colour(rng)[1]
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    light = 1 + 0.10 * (0.5 - y) + 0.08 * rng.uniform(-1, 1) * (x - 0.5)
    image = np.ones((height, width, 3)) * colour
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        t = np.clip(0.5 + 0.7 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)), 0, 1)[..., None]
        image = colour * (1 - t) + np.clip(other * 0.6 + colour * 0.4, 0, 1) * t
        words = f"a {name} gradient"
    elif kind == "stripes":
        period, angle = rng.uniform(0.10, 0.25), rng.choice([0.0, np.pi / 2, np.pi / 4])
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
        t = np.clip(0.5 + 3 * wave, 0, 1)[..., None]
        image = colour * (1 - 0.22 * t)
        words = f"{name} stripes"
    elif kind == "room":
        floor, corner = rng.uniform(0.72, 0.86), rng.uniform(0.15, 0.85)
        image = np.where((x < corner)[..., None], colour, colour * 0.86)
        image = np.where((y > floor)[..., None], 0.5 * other + 0.15, image)
        words = f"a {name} room"
    elif kind == "shapes":
        image = image.astype(np.float32)
        for _ in range(rng.integers(4, 9)):
            centre = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
            shade = np.clip(0.5 * _colour(rng)[1] + 0.5 * colour, 0, 1)
            cv2.circle(image, centre, int(rng.uniform(0.06, 0.25) * width), shade.tolist(), -1)
        image = cv2.GaussianBlur(image, (0, 0), 0.04 * width)
        words = f"blurred {name} lights"
    elif kind == "window":
        left, top = rng.uniform(0.02, 0.6), rng.uniform(0.02, 0.2)
        inside = (x > left) & (x < left + 0.35) & (y > top) & (y < top + 0.5)
        bars = (np.abs(x - left - 0.175) < 0.012) | (np.abs(y - top - 0.25) < 0.012)
        image = np.where((inside & ~bars)[..., None], [0.80, 0.88, 0.95], image)
        words = f"a {name} wall with a window"
    else:
        words = f"a {name} wall"
    return np.clip(image * light[..., None], 0, 1).astype(np.float32), words
