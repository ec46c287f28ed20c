"""From records to batches: schedule, mixture, windows, loader."""
