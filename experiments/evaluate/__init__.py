"""How well each condition is obeyed on held-out clips."""
