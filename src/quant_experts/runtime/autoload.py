"""Registers our quantizer as soon as `transformers` is imported, in any program of an environment that has this
package.

`transformers` has no plugin entry point, and without our quantizer it only warns and loads random weights. The wheel
therefore installs a `.pth` file that imports this module when an interpreter starts. It must cost next to nothing and
must never break an interpreter: it imports nothing but the standard library and only leaves a finder behind.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"


class _RegisteringLoader(Loader):
    """Executes the module as its own loader would, then registers our quantizer with it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        try:
            import quant_experts.runtime.transformers_hook  # noqa: F401
        except Exception as error:  # whatever it is, transformers must work for programs that do not need us
            warnings.warn(f"quant-experts cannot load its checkpoints with this transformers: {error!r}", stacklevel=2)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TRIGGER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


if _TRIGGER not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
