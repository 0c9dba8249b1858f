"""Launchers of the kernels in ``metal/``, and when a kernel is trusted on a machine."""
