"""Timings of what the framework does most."""
