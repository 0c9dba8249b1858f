"""What can be wrong with a kernel, or with the machine that should run it."""


class ToolError(Exception):
    """The machine lacks something that every kernel needs, such as a compiler."""


class KernelError(Exception):
    """A kernel is wrong, and this is where.

    Attributes:
        kind: The kind of mistake, such as `race` or `out-of-bounds`.
        where: File and line of kernel text, `decode.metal:53`.
        message: What happened there.
    """

    def __init__(self, kind: str, where: str, message: str):
        super().__init__(f"{where}: [{kind}] {message}")
        self.kind = kind
        self.where = where
        self.message = message


class TextError(KernelError):
    """The text is refused before it runs; the kind is `compile`, `strict` or `lint`."""


class RunError(KernelError):
    """The run was stopped by a mistake of the kernel."""
