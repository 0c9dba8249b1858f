"""Models in GGUF files: what llama.cpp, LM Studio and Ollama keep, as mlx-lm takes it."""
