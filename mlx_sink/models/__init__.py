"""Find, check, load and attach a model of mlx-lm."""
