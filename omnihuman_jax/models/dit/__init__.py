"""The multi-modal diffusion transformer."""
