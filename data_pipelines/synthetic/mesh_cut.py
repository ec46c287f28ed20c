"""Cuts quads along curves, so that hairlines, collars and stripes have clean edges on a coarse mesh."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.synthetic.body import Body


def cut(body: Body, field: np.ndarray, where: np.ndarray) -> Body:
    """Splits quads where `field` changes sign.

    Args:
      field: (V,) values at the vertices; the cut is where linear interpolation along the edges gives 0.
      where: (Q,) bool, the quads that may be cut.

    Returns:
      A body with more vertices and quads. Triangles are quads with a repeated corner; pieces keep their zone.
    """
    corner = field[body.quads]
    inside = corner > 0
    count = inside.sum(1)
    # Two opposite corners inside would give two separate pieces; these rare saddles are not cut.
    saddle = (count == 2) & (inside[:, 0] == inside[:, 2])
    split = np.flatnonzero(where & (count > 0) & (count < 4) & ~saddle)
    if not len(split):
        return body
    ends, pieces, parents = [], [], []
    numbers: dict[tuple[int, int], int] = {}

    def crossing(a: int, b: int) -> int:
        key = (min(a, b), max(a, b))
        if key not in numbers:
            numbers[key] = len(body.vertices) + len(ends)
            ends.append(key)
        return numbers[key]

    for q in split:
        for side in (True, False):
            outline = _outline(body.quads[q].tolist(), inside[q].tolist(), side, crossing)
            for piece in _quads(outline):
                pieces.append(piece)
                parents.append(q)
    kept = np.setdiff1d(np.arange(len(body.quads)), split)
    parent = np.concatenate([kept, np.array(parents)])
    quads = np.concatenate([body.quads[kept], np.array(pieces, np.int32)])
    pairs = np.array(ends)
    a, b = field[pairs[:, 0]], field[pairs[:, 1]]
    return _extend(body, pairs, (a / (a - b)).astype(np.float32), quads, parent)


def _outline(corners, inside, side, crossing) -> list[int]:
    """Corners, in order, of the part of a quad where inside == side."""
    outline = []
    for i in range(4):
        following = (i + 1) % 4
        if inside[i] == side:
            outline.append(corners[i])
        if inside[i] != inside[following]:
            outline.append(crossing(corners[i], corners[following]))
    return outline


def _quads(outline: list[int]) -> list[list[int]]:
    """A polygon of 3, 4 or 5 corners as quads."""
    if len(outline) == 3:
        return [[*outline, outline[2]]]
    if len(outline) == 4:
        return [outline]
    return [outline[:4], [outline[0], outline[3], outline[4], outline[4]]]


def _extend(body: Body, pairs: np.ndarray, share: np.ndarray, quads: np.ndarray, parent: np.ndarray) -> Body:
    """Adds a vertex on each edge of `pairs` (N,2), at the fraction `share` (N,) from its first end."""
    first, second = pairs.T

    def between(values: np.ndarray) -> np.ndarray:
        part = share.reshape(-1, *([1] * (values.ndim - 1)))
        return np.concatenate([values, values[first] * (1 - part) + values[second] * part])

    column = np.full(len(body.vertices), -1)
    column[body.face_vertices] = np.arange(len(body.face_vertices))
    units = np.concatenate([body.face_units, np.zeros_like(body.face_units[:, :1])], 1)  # column -1: no movement
    moving = np.flatnonzero((column[first] >= 0) | (column[second] >= 0))
    part = share[moving, None]
    new = units[:, column[first[moving]]] * (1 - part) + units[:, column[second[moving]]] * part
    return dataclasses.replace(
        body,
        vertices=between(body.vertices),
        quads=quads,
        zones=body.zones[parent],
        targets=np.moveaxis(between(np.moveaxis(body.targets, 0, 1)), 1, 0),
        face_units=np.concatenate([body.face_units, new], 1),
        face_vertices=np.concatenate([body.face_vertices, (len(body.vertices) + moving).astype(np.int32)]),
        weights=between(body.weights),
    )
