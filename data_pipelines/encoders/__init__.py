"""Pretrained encoders that load offline: speech features, caption token states, keypoints."""
