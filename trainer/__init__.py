"""The trainer: model, operations, data reader, optimizers, training loop. It handles tensors and files, not
clusters."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, looked up lazily, because the lookup takes longer than many commands."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("yaongi")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0.0.0+source"
