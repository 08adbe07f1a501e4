"""Evaluation: requests to a model, tasks made of them, and what their answers score."""
