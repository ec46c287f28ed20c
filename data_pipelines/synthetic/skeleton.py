"""Poses the mesh by linear blend skinning, with two-bone inverse kinematics for the arms."""

from __future__ import annotations

import numpy as np

from data_pipelines.synthetic.people import Person

Rotations = dict[str, np.ndarray]  # bone -> (F,3,3) in the axes of the rest pose, applied after the parent's


def axis_angle(axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotation matrices (F,3,3) about unit axes (3,) or (F,3) by angles (F,) in radians."""
    angle = np.asarray(angle, np.float64)
    axis = np.broadcast_to(np.asarray(axis, np.float64), (*angle.shape, 3))
    x, y, z = np.moveaxis(axis, -1, 0)
    zero = np.zeros_like(x)
    k = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*angle.shape, 3, 3)
    sine, cosine = np.sin(angle)[..., None, None], np.cos(angle)[..., None, None]
    return np.eye(3) + sine * k + (1 - cosine) * (k @ k)


def euler(pitch: np.ndarray, yaw: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Rotations (F,3,3): roll about z, then pitch about x (positive: nod down), then yaw about y, in radians."""
    x, y, z = np.eye(3)
    return axis_angle(y, yaw) @ axis_angle(x, pitch) @ axis_angle(z, roll)


def align(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The smallest rotations (F,3,3) from unit vectors source (3,) or (F,3) to target (F,3)."""
    source = np.broadcast_to(source, target.shape)
    axis = np.cross(source, target)
    sine = np.linalg.norm(axis, axis=-1)
    cosine = (source * target).sum(-1)
    return axis_angle(axis / np.maximum(sine, 1e-9)[:, None], np.arctan2(sine, cosine))


def reach(person: Person, side: str, wrist: np.ndarray, pole: np.ndarray) -> Rotations:
    """Rotations of one arm that move the wrist to a position.

    Args:
      side: "l" or "r".
      wrist: (F,3) relative to the shoulder in the axes of the chest, in lengths of the stretched arm.
      pole: (3,) direction of the elbow.
    """
    upper, lower = person.bones.index(f"upperarm_{side}"), person.bones.index(f"lowerarm_{side}")
    hand = person.bones.index(f"hand_{side}")
    first = person.heads[lower] - person.heads[upper]
    second = person.heads[hand] - person.heads[lower]
    a, b = np.linalg.norm(first), np.linalg.norm(second)
    goal = wrist * (a + b)
    distance = np.clip(np.linalg.norm(goal, axis=-1), 0.25 * (a + b), 0.995 * (a + b))
    ahead = goal / np.linalg.norm(goal, axis=-1, keepdims=True)
    bend = pole - (ahead @ pole)[:, None] * ahead
    bend = bend / np.linalg.norm(bend, axis=-1, keepdims=True)
    along = (a * a + distance**2 - b * b) / (2 * distance)
    off = np.sqrt(np.maximum(a * a - along**2, 0))
    elbow = along[:, None] * ahead + off[:, None] * bend
    turn = align(first / a, elbow / a)
    onward = (distance[:, None] * ahead - elbow) / b
    local = np.einsum("fji,fj->fi", turn, onward)
    return {f"upperarm_{side}": turn, f"lowerarm_{side}": align(second / b, local)}


def skin(person: Person, points: np.ndarray, rotations: Rotations, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Applies linear blend skinning.

    Args:
      points: (F,V,3) the mesh at rest with face units applied.
      rotations: of the bones that move.
      shift: (F,3) of the pelvis, dm.

    Returns:
      Posed points (F,V,3) and posed joints (F,B,2,3), the heads and tails of the bones.
    """
    frames, count = len(points), len(person.bones)
    turns = np.zeros((frames, count, 3, 3))
    places = np.zeros((frames, count, 3))
    for b, name in enumerate(person.bones):
        parent = person.parents[b]
        local = rotations.get(name)
        if parent < 0:
            turns[:, b] = np.eye(3) if local is None else local
            places[:, b] = person.heads[b] + shift
        else:
            turns[:, b] = turns[:, parent] if local is None else turns[:, parent] @ local
            offset = person.heads[b] - person.heads[parent]
            places[:, b] = places[:, parent] + turns[:, parent] @ offset
    moves = places - np.einsum("fbij,bj->fbi", turns, person.heads)
    table = np.concatenate([turns, moves[..., None]], -1).astype(np.float32).reshape(frames, count, 12)
    posed = np.empty_like(points)
    for f in range(frames):
        blend = (person.weights @ table[f]).reshape(-1, 3, 4)
        posed[f] = np.einsum("vij,vj->vi", blend[..., :3], points[f]) + blend[..., 3]
    tails = places + np.einsum("fbij,bj->fbi", turns, person.tails - person.heads)
    return posed, np.stack([places, tails], 2)
