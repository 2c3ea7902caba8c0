"""The trainer: model, operations, data reader, optimizers, training loop. Knows tensors and files, no cluster."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, looked up when somebody asks for it, which takes longer than many commands."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("yaongi")
    except PackageNotFoundError:  # running from a source tree that was not installed
        return "0.0.0+source"
