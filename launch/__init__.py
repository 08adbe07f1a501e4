"""Launching: what an experiment asks for (sweep.py), and engines that run it (local.py)."""
