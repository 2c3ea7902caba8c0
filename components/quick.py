"""Import the Kubernetes client, or kfp, which imports it, without slow packages that we do not use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# If installed, it is imported for validation by the dynamic client, which `import kubernetes` loads and we do not use;
# its grammars take two seconds.
UNUSED = "kubernetes_validate"


@contextmanager
def quick_imports() -> Iterator[None]:
    """During the block the unused package appears not to be installed."""
    if UNUSED in sys.modules:
        yield
        return
    sys.modules[UNUSED] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[UNUSED]


class _Cluster(ModuleType):
    """Replaces a part of kfp that only matters on a cluster: every function returns the task."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda task=None, *_, **__: task


@contextmanager
def local_kfp() -> Iterator[None]:
    """During the block kfp is imported without its clients, and the pipeline without settings for a cluster's pods.

    Both import the Kubernetes client, which takes half of the import time.
    """
    absent = ("kfp.client", "kfp.registry", "kfp.kubernetes")
    sys.modules.update({name: _Cluster(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
