"""Kernels: fast ways to compute what a few lines of jax.numpy define, each beside its reference."""
