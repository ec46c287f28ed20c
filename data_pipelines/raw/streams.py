"""Which of a file's streams is its picture, and which its sound."""

from __future__ import annotations

import av


def picture(container: av.container.InputContainer) -> av.VideoStream | None:
    """The default video stream, else the first; None if there is none. Attached pictures, as covers, do not count."""
    disposition = av.stream.Disposition
    still = disposition.attached_pic | disposition.timed_thumbnails
    return _default([stream for stream in container.streams.video if not stream.disposition & still])


def sound(container: av.container.InputContainer) -> av.AudioStream | None:
    """The default sound track, else the first; None if there is none."""
    return _default(list(container.streams.audio))


def _default(found: list):
    marked = [stream for stream in found if stream.disposition & av.stream.Disposition.default]
    return next(iter([*marked, *found]), None)
