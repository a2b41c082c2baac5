"""Quant Experts: shrink vision-language models with quantized weights and token-routed low-rank experts.

Names are imported on first use, so that `import quant_experts` costs nothing (it happens at every start of an
interpreter that has the package installed; see `runtime/autoload.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant_experts.config import QuantizationConfig as QuantizationConfig
    from quant_experts.config import Recipe as Recipe
    from quant_experts.config import Scheme as Scheme
    from quant_experts.errors import QuantExpertsError as QuantExpertsError
    from quant_experts.pipeline import quantize as quantize
    from quant_experts.runtime.loading import load as load
    from quant_experts.runtime.processor import load_processor as load_processor

__version__ = "0.1.0"

_HOMES = {
    "QuantizationConfig": "config",
    "Recipe": "config",
    "Scheme": "config",
    "QuantExpertsError": "errors",
    "quantize": "pipeline",
    "load": "runtime.loading",
    "load_processor": "runtime.processor",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quant_experts' has no attribute '{name}'")
    return getattr(import_module(f"quant_experts.{_HOMES[name]}"), name)
