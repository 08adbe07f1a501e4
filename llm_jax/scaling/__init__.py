"""Scaling: planning (grids) and analysis (laws, fits, forecasts, reports), from tables of runs alone."""
