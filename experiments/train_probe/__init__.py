"""Training of the probe that reads keypoints, mouth and appearance off rendered frames."""
