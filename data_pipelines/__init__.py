"""Raw media to records to batches."""
