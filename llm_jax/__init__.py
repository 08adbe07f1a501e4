"""llm_jax: scaling experiments for language models in JAX. ARCHITECTURE.md shows the rooms of this house."""
