"""Metal kernels: their text, how it is built, and one launcher a kernel."""
