"""Import the Kubernetes client, or kfp, which brings it, without what they import beside it and nobody needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# The dynamic client, which `import kubernetes` loads and nothing here uses, imports this one where it is installed, to
# validate by; its grammars take two seconds.
UNUSED = "kubernetes_validate"


@contextmanager
def quick_imports() -> Iterator[None]:
    """During the block the unused package looks as if it were not installed."""
    if UNUSED in sys.modules:
        yield
        return
    sys.modules[UNUSED] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[UNUSED]


class _Cluster(ModuleType):
    """In place of a part of kfp that says what holds on a cluster: every function gives back the task."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda task=None, *_, **__: task


@contextmanager
def local_kfp() -> Iterator[None]:
    """During the block kfp comes without its clients, and the pipeline without what only a cluster's pods obey.

    Both bring the Kubernetes client, which takes half of the time that the import takes.
    """
    absent = ("kfp.client", "kfp.registry", "kfp.kubernetes")
    sys.modules.update({name: _Cluster(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
