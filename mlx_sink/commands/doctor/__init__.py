"""`doctor`: are the kernels right on this machine, and how fast."""
