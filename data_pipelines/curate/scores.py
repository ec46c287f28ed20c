"""What each score of a clip means; the report and the manifest read this table."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    """A score's unit and meaning, in words for the report."""

    unit: str
    meaning: str


TABLE = {
    "side": Score("pixels", "shorter side without black bars"),
    "sharpness": Score(
        "variance",
        "Laplacian of the luma, 90th percentile of 8 x 8 cells, shorter side at most 480; median over frames",
    ),
    "brightness": Score("0..1", "mean luma"),
    "clipped": Score("share", "pixels that are black (below 8) or white (above 247)"),
    "subject_motion": Score(
        "heights/s", "optical flow without the camera's, 99th percentile of the picture, mean over time"
    ),
    "camera_motion": Score("heights/s", "flow of the camera: shift, turn and zoom fitted to the whole picture"),
    "person_share": Score("share of frames", "frames with a person"),
    "people": Score("people", "faces of similar size that are seen together in at least a fifth of the frames"),
    "face_height": Score("share of height", "median height of the face in the picture"),
    "face_pixels": Score("pixels", "median height of the face in the source"),
    "speech_share": Score("share of frames", "frames with speech (Silero VAD above 0.5)"),
    "mouth_motion": Score("eye distances", "standard deviation of the mouth's opening"),
    "sync_correlation": Score(
        "correlation", "lip-sync proxy: mouth opening against speech energy, best within the tolerated lags"
    ),
    "pose_visibility": Score("share of frames", "frames that show the nose and both shoulders"),
    "pose_stability": Score("share of steps", "steps without a jump of the nose by half a shoulder width"),
    "pose_jitter": Score("shoulder widths", "median second difference of the body's points from frame to frame"),
    "hands_visibility": Score("share of frames", "frames with thumb and index finger of at least one hand"),
    "hands_jitter": Score("shoulder widths", "median second difference of the fingertips"),
}
