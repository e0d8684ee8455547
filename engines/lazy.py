"""Lazy faces: a package that imports a name from its modules when the name is first used (PEP 562)."""

__all__ = ["lazy_names"]

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], object]:
    """Return the `__getattr__` of `package`, whose names are imported on first use.

    `homes` maps a module, relative to `package` or whole, to the names it defines. ``--help`` and ``import sdxl_trt``
    then load no numpy, and each backend is loaded only where it runs.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = modules[name]
        return getattr(import_module(module if module.startswith("sdxl_trt.") else f"{package}.{module}"), name)

    return find
