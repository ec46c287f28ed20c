"""Open checkpoints <-> our parameters: one file a format, name rules as a table."""
