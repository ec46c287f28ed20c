"""Training of the probe that reads keypoints, mouth and appearance from rendered frames."""
