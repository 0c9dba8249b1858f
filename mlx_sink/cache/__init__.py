"""What a layer keeps between calls, in the protocol of mlx-lm's caches."""
