"""Flow matching: the path and its loss, times, guidance and ODE solvers, as small pure functions."""
