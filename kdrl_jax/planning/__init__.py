"""What a run would need and could do on devices that are not at hand; see `kdrl_jax.plan`."""
