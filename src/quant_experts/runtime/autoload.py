"""Makes `transformers` know us in any program of an environment that has this package, without an import of ours.

`transformers` has no plugin entry point, and without our quantizer it only warns and loads random weights. The wheel
therefore installs a `.pth` file that imports this module when an interpreter starts. It must cost next to nothing and
must never break an interpreter: it imports nothing but the standard library and only leaves a finder behind, which adds
what `_ADDITIONS` says when a module of `transformers` is imported.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_ADDITIONS = {
    "transformers.quantizers.auto": "quant_experts.runtime.transformers_hook",
    "transformers.processing_utils": "quant_experts.runtime.video_slot",
}
"""Module of transformers -> module of ours that is imported right after it."""


class _AddingLoader(Loader):
    """Executes a module as its own loader would, then imports what belongs to it."""

    def __init__(self, loader: Loader, addition: str) -> None:
        self._loader, self._addition = loader, addition

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        try:
            import_module(self._addition)
        except Exception as error:  # whatever it is, transformers must work for programs that do not need us
            warnings.warn(f"quant-experts does not work with this transformers: {error!r}", stacklevel=2)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _ADDITIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _AddingLoader(spec.loader, _ADDITIONS[name])
        return spec


sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
if not _ADDITIONS.keys() <= sys.modules.keys():
    sys.meta_path.insert(0, _Finder())
