"""`convert`: a Hugging Face checkpoint to a folder that mlx_sink loads."""
