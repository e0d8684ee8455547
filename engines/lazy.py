"""Lazy packages: a name is imported from its module when it is first used (PEP 562)."""

__all__ = ["lazy_names"]

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], object]:
    """Return a `__getattr__` for `package` that imports each name on first use.

    `homes` maps a module, relative to `package` or absolute, to the names it defines. ``--help`` and ``import
    sdxl_trt`` then load no numpy, and a backend is loaded only when it runs.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = modules[name]
        return getattr(import_module(module if module.startswith("sdxl_trt.") else f"{package}.{module}"), name)

    return find
