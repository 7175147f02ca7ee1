"""Imports of qdrant_client that run only the parts in use.

The package's own ``__init__`` modules build every REST model, REST client and local engine at once,
which costs each process more than half a second of CPU and 50 MB. We speak gRPC with the
generated stubs, and use a few models. So the two packages begin empty here; their submodules are
imported as they are asked for, and whoever asks for one of the clients themselves gets the package
run as ever.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

#: From the outside in.
_PACKAGES: Final = ("qdrant_client", "qdrant_client.http")


class _UnrunPackage(ModuleType):
    """A package whose ``__init__`` runs with the first attribute that is no submodule."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__loader__ = spec.loader
        self.__package__ = spec.name
        self.__path__ = list(spec.submodule_search_locations or ())
        self.__file__ = spec.origin

    def __getattr__(self, name: str) -> object:
        # The import system asks for dunder names that a package need not have.
        if type(self) is _UnrunPackage and not name.startswith("__"):
            submodule = f"{self.__name__}.{name}"
            if importlib.util.find_spec(submodule) is not None:
                return importlib.import_module(submodule)
            self._run()
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def _run(self) -> None:
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]  # an ordinary package from here on
        self.__spec__.loader.exec_module(self)


def prepare() -> None:
    """Have both packages begin empty, unless one has been imported already."""
    if not any(name in sys.modules for name in _PACKAGES):
        for name in _PACKAGES:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            sys.modules[name] = _UnrunPackage(spec)
