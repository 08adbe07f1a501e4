"""Launching: what an experiment asks for (sweep.py), and engines that run it (local.py)."""

import llm_jax  # noqa: F401  first, as a command's modules load: what ^C then says
