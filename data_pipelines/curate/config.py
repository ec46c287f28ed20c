"""Settings and thresholds of the curation, each overridable as --config.KEY=VALUE.

`general`, `audio` and `pose` map a score of `scores.TABLE` to the values that pass, from `min` to `max`. A clip outside
of a `general` range is dropped; one outside of an `audio` or `pose` range is kept without that condition. Changes of
`cuts` make other clips, which are scored anew; all other changes only judge again.
"""

from __future__ import annotations

import math

from ml_collections import ConfigDict

CONTENT, ADAPTIVE = "content", "adaptive"


def _range(low: float = -math.inf, high: float = math.inf) -> dict[str, float]:
    return {"min": float(low), "max": float(high)}


def get_config() -> ConfigDict:
    """The defaults. Speech thresholds were set on the three speaking real clips and on rendered ones."""
    config = ConfigDict()
    config.cuts = {
        "detector": ADAPTIVE,  # or "content": PySceneDetect's AdaptiveDetector or ContentDetector
        "adaptive_threshold": 3.0,  # change of a frame relative to its neighbours' mean
        "content_threshold": 27.0,  # mean change of hue, saturation and luma, 0..255
        "min_seconds": 5.0,  # shorter shots are dropped, longer ones than max_seconds divided evenly
        "max_seconds": 30.0,
        "keep_short": False,  # keep sources (not shots of them) that are shorter than min_seconds
    }
    config.general = {
        "side": _range(128),
        "sharpness": _range(30),
        "brightness": _range(0.06, 0.92),
        "clipped": _range(high=0.5),
        "subject_motion": _range(0.0003, 4.0),
        "camera_motion": _range(high=0.6),
        "person_share": _range(0.8),
        "people": _range(high=1),
        "face_height": _range(0.03),
    }
    config.audio = {
        "speech_share": _range(0.2),
        "face_pixels": _range(32),
        "mouth_motion": _range(0.02),
        "sync_correlation": _range(0.38),
    }
    config.pose = {
        "pose_visibility": _range(0.8),
        "pose_stability": _range(0.98),
        "pose_jitter": _range(high=0.06),
        "hands_visibility": _range(),  # reported; a minimum makes hands a requirement of pose
    }
    config.sync = {
        "usual_lag": 2,  # frames by which the loudest moment follows the widest opening in clips that are in sync
        "tolerance": 4,  # frames around it that count as in sync
        "max_offset": 15,  # frames around it in which a constant offset is looked for
        "repair_correlation": 0.55,  # of the source's mean curve, from which on an offset is repaired
    }
    config.duplicates = {
        "drop": True,
        "max_bits": 10,  # mean Hamming distance of 64-bit perceptual hashes
        "min_correlation": 0.9,  # of the brightness over time in 4 x 4 cells
    }
    return config
