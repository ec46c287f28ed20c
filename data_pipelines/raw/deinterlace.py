"""Interlaced frames hold two moments; this keeps one of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import av


def deinterlaced(
    frames: Iterable[tuple[Any, av.VideoFrame]], stream: av.VideoStream
) -> Iterator[tuple[Any, av.VideoFrame]]:
    """Yields (item, frame) in order, with every interlaced frame replaced by one that shows its first moment.

    Progressive frames, and all frames before the first interlaced one, are passed through unchanged.
    """
    graph, waiting = None, deque()
    for item, frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield item, frame
            continue
        graph = graph or _graph(stream, frame)
        waiting.append(item)
        graph.push(frame)
        yield from _ready(graph, waiting)
    if graph is not None:
        graph.push(None)
        yield from _ready(graph, waiting)


def _graph(stream: av.VideoStream, frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or stream.time_base
    )
    graph.link_nodes(source, graph.add("bwdif", "send_frame:auto:interlaced"), graph.add("buffersink")).configure()
    return graph


def _ready(graph: av.filter.Graph, waiting: deque) -> Iterator[tuple[Any, av.VideoFrame]]:
    while waiting:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield waiting.popleft(), frame
