"""Load optional GPU packages: a missing or broken one gives a reason, never a crash.

Packages with compiled parts fail in many ways when they do not fit torch (ImportError, OSError of a missing library,
ValueError of their own version checks), so loading catches everything, once for each module. What crashes at the
import is found by another process first, and refused here (`refuse`).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_refused: dict[str, str] = {}
_observers: list[Callable[[str | None], None]] = []


def refuse(reasons: dict[str, str]) -> None:
    """Never import these modules in this process: they end it, as another process has shown (trainer/proof)."""
    _refused.update(reasons)
    load.cache_clear()
    load_without_init.cache_clear()


def observe(observer: Callable[[str | None], None]) -> None:
    """Let `observer` know the module before each import, and None after it."""
    _observers.append(observer)


def _tell(module: str | None) -> None:
    for observer in _observers:
        observer(module)


@cache
def load(module: str) -> ModuleType | str:
    """The imported module, or a one-line reason why it cannot be imported."""
    if module in _refused:
        return _refused[module]
    package = module.partition(".")[0]
    try:
        if find_spec(package) is None:
            return f"{package} is not installed"
        _tell(module)
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # see above
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return f"{package} is installed but broken ({type(error).__name__}: {first_line})"
    finally:
        _tell(None)


@cache
def load_without_init(module: str) -> ModuleType | str:
    """Like `load`, for a module whose package imports compiled extensions in its `__init__` that it does not need.

    The package is entered into sys.modules as an empty one with the right path, so that `__init__` never runs.
    """
    package = module.partition(".")[0]
    if package not in sys.modules:
        spec = find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            return f"{package} is not installed"
        empty = ModuleType(package)
        empty.__path__, empty.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules[package] = empty
    return load(module)


@dataclass(frozen=True)
class Kernel:
    """A function of a package, with the names of its parameters, which differ between versions."""

    function: Callable[..., Any]
    parameters: frozenset[str]


# Filled while backends are chosen: torch.compile reads a dictionary, but cannot look into imports and signatures.
_KERNELS: dict[str, Kernel] = {}


def kernel(path: str) -> Kernel:
    """The function `module:name`.

    Raises:
        ImportError: it cannot be loaded, which `kernel_problem` would have told.
    """
    if path not in _KERNELS and (reason := kernel_problem(path)) is not None:
        raise ImportError(reason)
    return _KERNELS[path]


def kernel_problem(path: str) -> str | None:
    """Load the function `module:name`; None when that succeeds, else why not."""
    module, _, name = path.partition(":")
    if isinstance(found := load(module), str):
        return found
    if not hasattr(found, name):
        return f"{module} has no {name}"
    function = getattr(found, name)
    _KERNELS[path] = Kernel(function, frozenset(inspect.signature(function).parameters))
    return None


def problem(found: ModuleType | str) -> str | None:
    """The reason in the result of a load; None when it is a module."""
    return found if isinstance(found, str) else None
