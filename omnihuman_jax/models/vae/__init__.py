"""The causal 3D VAE and what trains it."""
