"""Brows, irises, glasses and hair, which the body mesh lacks, as quads attached to the body.

They are defined on the template (data_pipelines/synthetic/body.py, decimetres) and move to a person with the vertices
that they are tied to, or with the bounding box of the head.
"""

from __future__ import annotations

import dataclasses

import numpy as np

EYE = np.array([0.3078, 7.2842, 1.2455])  # centre of the left eye on the template
EYE_RADIUS = 0.138
HEAD_LOW, HEAD_HIGH = np.array([-0.82, 6.17, -0.98]), np.array([0.82, 8.49, 1.53])  # without the ears


@dataclasses.dataclass
class Part:
    """points (N,3); quads (M,4) into them; albedo (M,3); bias dm towards the camera.

    tied: (N,) body vertices whose bones and face units the points follow. Without it, head: (N,) weight of the head
    bone, the rest goes to the chest (None: all head). gaze: (2,N,3) offsets per radian of gaze to the right and up.
    """

    points: np.ndarray
    quads: np.ndarray
    albedo: np.ndarray
    bias: float = 0.0
    two_sided: bool = True
    tied: np.ndarray | None = None
    head: np.ndarray | None = None
    gaze: np.ndarray | None = None


def grid(rows: int, columns: int, wrap: bool = False) -> np.ndarray:
    """Quads (M,4) of a rows x columns grid of points, row by row; `wrap` joins the last column to the first."""
    r, c = np.meshgrid(np.arange(rows - 1), np.arange(columns if wrap else columns - 1), indexing="ij")
    n = (c + 1) % columns
    return np.stack([r * columns + c, r * columns + n, (r + 1) * columns + n, (r + 1) * columns + c], -1).reshape(-1, 4)


def _both_sides(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, points * [-1, 1, 1]])


def _twice(quads: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([quads, quads + count])


def fit_head(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Maps template points to a head with the bounding box low..high."""
    scale = (high - low) / (HEAD_HIGH - HEAD_LOW)
    return (low + (points - HEAD_LOW) * scale).astype(np.float32)


def nearest_front(points: np.ndarray, surface: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidate vertex nearest to each point in x and y."""
    distance = np.square(points[:, None, :2] - surface[None, candidates, :2]).sum(-1)
    return candidates[distance.argmin(1)]


def brows(colour, thickness: float, surface: np.ndarray, front: np.ndarray) -> Part:
    """Two curved strips on the brow ridge; `front`: vertices of the front of the head."""
    t = np.linspace(0, 1, 7)
    x = 0.115 + 0.40 * t
    y = 7.475 + 0.075 * np.sin(np.pi * (0.15 + 0.75 * t)) - 0.05 * t
    half = 0.038 * thickness * np.sin(np.pi * (0.25 + 0.72 * t)) + 0.006
    points = np.concatenate([np.stack([x, y + half, 0 * x], 1), np.stack([x, y - half, 0 * x], 1)])
    points = _both_sides(points)
    tied = nearest_front(points, surface, front)
    # Depth: slightly in front of the mean of the nearest vertices.
    distance = np.square(points[:, None, :2] - surface[None, front, :2]).sum(-1)
    near = front[np.argsort(distance, 1)[:, :3]]
    points[:, 2] = surface[near, 2].mean(1) + 0.015
    quads = _twice(grid(2, 7), 14)
    return Part(points, quads, np.tile(colour, (len(quads), 1)), 0.05, tied=tied)


def irises(colour) -> Part:
    """A coloured disc, a pupil and a glint on each eye, and their offsets when the eyes turn."""
    angle = np.arange(8) * np.pi / 4 + np.pi / 8
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    points, colours, quads = [], [], []
    fan = np.array([[0, 1, 2, 3], [0, 3, 4, 7], [7, 4, 5, 6]])
    for radius, shade in ((0.072, np.array(colour)), (0.034, np.array([0.03, 0.03, 0.03]))):
        quads += list(fan + 8 * (len(points)))
        xy = ring * radius
        z = np.sqrt(EYE_RADIUS**2 - radius**2) + (0.008 if radius > 0.05 else 0.014)
        points.append(np.concatenate([EYE[:2] + xy, np.full((8, 1), EYE[2] + z)], 1))
        colours += [shade] * 3
    # A glint makes eyes recognisable even if they are six pixels wide.
    quads += [np.array([16, 17, 18, 19])]
    glint = EYE + np.array([[0.0, 0.05, 0.16], [0.028, 0.05, 0.16], [0.028, 0.022, 0.16], [0.0, 0.022, 0.16]])
    points.append(glint - [0.03, 0, 0])
    colours.append(np.array([0.95, 0.95, 0.95]))
    left = np.concatenate(points)
    shift = np.concatenate([left + 0, left * [-1, 1, 1]])
    shift[20 + 16 :, 0] = -(glint[:, 0] - 0.03) + 0.0  # not mirrored, since the light comes from one side
    quads = _twice(np.array(quads), 20)
    moves = np.zeros((2, 40, 3))
    moving = np.r_[0:16, 20:36]
    moves[0, moving] = [EYE_RADIUS, 0, 0]
    moves[1, moving] = [0, EYE_RADIUS, 0]
    return Part(shift, quads, np.tile(np.stack(colours), (2, 1)), 0.012, gaze=moves)


def glasses() -> Part:
    """Dark frames: a ring around each eye, a bridge, temples."""
    angle = np.arange(10) * 2 * np.pi / 10
    ring = np.stack([0.225 * np.cos(angle), 0.16 * np.sin(angle), 0 * angle], 1)
    points = np.concatenate([EYE + np.array([0, 0, 0.36]) + size * ring for size in (1, 0.86)])
    quads = [grid(2, 10, wrap=True)]
    arm = np.array([[0.52, 7.33, 1.58], [0.52, 7.29, 1.58], [0.78, 7.29, 0.8], [0.78, 7.33, 0.8]])
    bridge = np.array([[0.0, 7.33, 1.66], [0.0, 7.30, 1.66], [0.1, 7.29, 1.61], [0.1, 7.32, 1.61]])
    points = np.concatenate([points, arm, bridge])
    quads += [np.array([[20, 21, 22, 23], [24, 25, 26, 27]])]
    both = _twice(np.concatenate(quads), len(points))
    return Part(_both_sides(points), both, np.tile([0.08, 0.08, 0.09], (len(both), 1)), 0.05)


def curtain(colour, end: float, rng: np.random.Generator) -> Part:
    """Hair around the back and the sides of the head, down to height `end` (template dm)."""
    columns = 25
    phi = np.linspace(-1.9, 1.9, columns)
    heights = np.concatenate([[8.28, 8.0, 7.6, 7.1], np.linspace(6.6, end, 2 + round((6.6 - end) / 0.5))])
    rows = []
    for y in heights:
        top = np.clip((8.52 - y) / 0.75, 0, 1)
        bulge = np.sqrt(np.clip(1 - (1 - top) ** 2, 0.05, 1)) * (1.0 + 0.05 * np.clip((7.6 - y) / 1.5, 0, 1))
        wave = 1 + 0.025 * rng.standard_normal(columns)
        # Below the chin the hair lies behind and beside the neck.
        back = 0.12 * np.clip((6.6 - y) / 1.0, 0, 1)
        width, depth = 0.97 * bulge * wave, 1.22 * bulge * wave
        rows.append(np.stack([width * np.sin(phi), 0 * phi + y, 0.22 - back - depth * np.cos(phi)], 1))
    points = np.concatenate(rows)
    quads = grid(len(heights), columns)
    strands = 1 + 0.08 * rng.standard_normal((1, columns - 1))
    strands = strands + 0.02 * rng.standard_normal((len(heights) - 1, columns - 1))
    albedo = np.array(colour) * np.clip(strands.reshape(-1, 1), 0.6, 1.4)
    head = np.clip(1 - 0.5 * (6.4 - points[:, 1]) / 1.5, 0.4, 1)
    return Part(points, quads, albedo, 0.0, head=head)


def bun(colour) -> Part:
    """A ball of hair at the back of the crown."""
    u, v = np.meshgrid(np.linspace(0, np.pi, 6), np.arange(10) * np.pi / 5, indexing="ij")
    ball = 0.42 * np.stack([np.sin(u) * np.cos(v), np.cos(u), np.sin(u) * np.sin(v)], -1).reshape(-1, 3)
    quads = grid(6, 10, wrap=True)
    return Part(ball + np.array([0, 8.62, -0.35]), quads, np.tile(colour, (len(quads), 1)))
