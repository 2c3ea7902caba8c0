"""The trainer: model, operations, data reader, optimizers, training loop. Knows tensors and files, no cluster."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("yaongi")
except PackageNotFoundError:  # running from a source tree that was not installed
    __version__ = "0.0.0+source"
