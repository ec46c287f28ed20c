"""Draws a posed mesh: camera, light, and quads painted from back to front with OpenCV at twice the size."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from data_pipelines.synthetic.people import Person, quad_normals, vertex_sum

SUPERSAMPLE = 2
SHIFT = 4  # fractional bits of the corners' pixel coordinates


@dataclasses.dataclass(frozen=True)
class Camera:
    """A camera that looks along -z at `centre` (2,) dm from `distance` dm, with `scale` pixels per dm at depth 0."""

    height: int
    width: int
    centre: tuple[float, float]
    scale: float
    distance: float

    def project(self, points: np.ndarray) -> np.ndarray:
        """Pixel positions (...,2) of points (...,3) in dm; x to the right, y down, pixel i covering i..i+1."""
        zoom = self.scale * self.distance / (self.distance - points[..., 2])
        x = self.width / 2 + (points[..., 0] - self.centre[0]) * zoom
        y = self.height / 2 - (points[..., 1] - self.centre[1]) * zoom
        return np.stack([x, y], -1)


@dataclasses.dataclass(frozen=True)
class Light:
    """direction (3,) to the lamp; strengths of lamp and ambient light; tint (3,) of both."""

    direction: np.ndarray
    lamp: float
    ambient: float
    tint: np.ndarray

    def shade(self, normals: np.ndarray) -> np.ndarray:
        """Brightness (...,) of surfaces with unit normals (...,3)."""
        # Wrapped Lambert, because skin is translucent and has a soft terminator.
        lambert = np.clip((normals @ self.direction + 0.25) / 1.25, 0, 1)
        sky = 0.5 + 0.5 * normals[..., 1]
        return self.lamp * lambert + self.ambient * (0.8 + 0.2 * sky)


def reduce(person: Person, keep: np.ndarray) -> Person:
    """The person with only the quads in the mask `keep` (Q,) and the vertices of these and of the landmarks."""
    used = np.zeros(len(person.rest), bool)
    used[person.quads[keep]] = True
    for ids in person.landmarks.values():
        used[ids] = True
    new = np.cumsum(used) - 1
    moved = used[person.unit_vertices]
    return dataclasses.replace(
        person,
        rest=person.rest[used],
        quads=new[person.quads[keep]].astype(np.int32),
        albedo=person.albedo[keep],
        bias=person.bias[keep],
        two_sided=person.two_sided[keep],
        units=person.units[:, moved],
        unit_vertices=new[person.unit_vertices[moved]],
        weights=person.weights[used],
        shade=person.shade[used],
        landmarks={name: new[ids] for name, ids in person.landmarks.items()},
    )


class Painter:
    """Draws frames of one person in front of one background."""

    def __init__(self, person: Person, camera: Camera, light: Light, background: np.ndarray):
        """background: (H,W,3) float in 0..1, SUPERSAMPLE times the camera's size."""
        cv2.setNumThreads(1)
        self._quads, self._bias, self._two_sided = person.quads, person.bias, person.two_sided
        self._albedo = person.albedo * person.shade[person.quads].mean(1)[:, None] * light.tint
        self._around = vertex_sum(person.quads, len(person.rest))
        self._camera, self._light = camera, light
        self._background = np.ascontiguousarray((background * 255).round().astype(np.uint8))

    def frame(self, points: np.ndarray) -> np.ndarray:
        """One picture (H,W,3) uint8 RGB of posed points (V,3)."""
        quads, camera = self._quads, self._camera
        flat = camera.project(points) * SUPERSAMPLE
        corners = flat[quads]
        # Quads are small, so one with all corners outside is not visible.
        inside = ((flat > 0) & (flat < np.array([camera.width, camera.height]) * SUPERSAMPLE)).all(1)
        a, b, c, d = inside[quads].T
        shown = np.flatnonzero(((_turn(corners) < 0) | self._two_sided) & (a | b | c | d))
        normals = self._around @ quad_normals(points, quads)
        normals = normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9)
        facing = normals[quads[shown]].mean(1)
        # Light the back of a two-sided quad like its front.
        facing = np.where((self._two_sided[shown] & (facing[:, 2] < 0))[:, None], -facing, facing)
        colours = self._albedo[shown] * self._light.shade(facing)[:, None]
        depth = points[quads[shown], 2].mean(1) + self._bias[shown]
        order = np.argsort(depth, kind="stable")
        polygons = np.round(corners[shown][order] * (1 << SHIFT)).astype(np.int32)
        paints = np.clip(colours[order] * 255, 0, 255).tolist()
        image = self._background.copy()
        for polygon, paint in zip(polygons, paints, strict=True):
            cv2.fillConvexPoly(image, polygon, paint, cv2.LINE_8, SHIFT)
        return cv2.resize(image, (camera.width, camera.height), interpolation=cv2.INTER_AREA)


def _turn(corners: np.ndarray) -> np.ndarray:
    """Twice the signed area (Q,) of projected quads (Q,4,2); negative for visible front sides."""
    first, second = corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
