"""The configs; as `rvq_jax.configs` they come with the package."""
