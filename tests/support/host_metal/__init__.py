"""Metal kernels on the CPU: the text that ships, run thread by thread and checked.

`metal_kernel` takes the place of `mx.fast.metal_kernel`. README.md beside this file explains how
it works and what it cannot show.
"""

from .errors import KernelError, RunError, TextError, ToolError
from .kernel import HostKernel, metal_kernel
from .runner import Report, Traffic

__all__ = [
    "HostKernel",
    "KernelError",
    "Report",
    "RunError",
    "TextError",
    "ToolError",
    "Traffic",
    "metal_kernel",
]
