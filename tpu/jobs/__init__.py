"""Jobs on TPU slices: what one is, how it is written down for each way to start it, and what it runs."""
