"""Import the Kubernetes client, or kfp, which brings it, without what they try to import beside it and nobody needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
