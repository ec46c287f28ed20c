"""Shared by the commands."""
