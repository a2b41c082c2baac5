"""Which backend computes what: one explicit table, read top to bottom, the first row that fits wins."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from quant_experts.config import ActivationFormat
from quant_experts.errors import QuantExpertsError
from quant_experts.kernels import cpu_int8, reference
from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.gpu_weight_only import backend as weight_only_backend
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared

P = ParamSpec("P")
T = TypeVar("T")


Weights = tuple[int, int | None, bool]
"""Weight bits, group size, symmetric."""


Activations = Literal["integer", "fp8", "values"]
"""Tokens quantized to integers or to fp8 numbers, or values as they are (weight-only schemes)."""


@dataclass(frozen=True)
class Layout:
    """For a backend that keeps tensors in a form of its own, all linears of a group stacked. P is that form."""

    pack: Callable[[GroupOperands, list[LinearOperands], torch.dtype], Any]
    """(group, linears, dtype of the inputs to come) -> P, once after loading"""
    apply: Callable[[Tensor, Any], Tensor]
    """(x (..., K), P) -> outputs of all linears side by side, (..., sum of N), in x's dtype"""
    codes: Callable[[Any, slice, int], Tensor]
    """(P, rows, K) -> those rows' codes (N, K) int8 again"""


@dataclass(frozen=True)
class Backend:
    """Two functions that together compute a quantized group, and where they apply."""

    name: str
    device: Literal["cpu", "cuda", "any"]
    activations: tuple[Activations, ...]
    """Kinds that it takes."""
    prepare: Callable[[Tensor, GroupOperands], Prepared]
    linear: Callable[[Prepared, LinearOperands], Tensor]
    usable: Callable[[Activations], bool]
    """Whether this machine can run it for such activations."""
    fits: Callable[[Weights], bool] = lambda weights: True
    """Whether weights of that kind are served."""
    layout: Layout | None = None

    @classmethod
    def of(
        cls, name: str, device: Literal["cpu", "cuda", "any"], activations: tuple[Activations, ...], module: Any
    ) -> Backend:
        """The backend that a module's `prepare`, `linear` and `usable` (or `is_exact`, where that is all) make, and
        `fits`, `pack`, `apply` and `codes` if it has them."""
        usable = module.usable if hasattr(module, "usable") else lambda activations: module.is_exact()
        backend = cls(name, device, activations, _Isolated(module.prepare), _Isolated(module.linear), usable)
        if hasattr(module, "pack"):
            layout = Layout(_Isolated(module.pack), _Isolated(module.apply), module.codes)
            return replace(backend, fits=module.fits, layout=layout)
        return backend


class _Isolated(Generic[P, T]):
    """An operation without gradients (there are none through rounding), outside autocast (which would round the
    operands again), and with the GPU of the first tensor as the current one, on which kernels are launched. An object,
    so that what holds it can be pickled."""

    def __init__(self, operation: Callable[P, T]) -> None:
        self.operation = operation

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0] if args else None
        elsewhere = isinstance(first, Tensor) and first.is_cuda and first.get_device() != torch.cuda.current_device()
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if not (elsewhere or autocast or torch.is_grad_enabled()):  # entering contexts takes as long as a launch
            return self.operation(*args, **kwargs)
        with torch.no_grad(), ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if elsewhere and isinstance(first, Tensor):
                stack.enter_context(torch.cuda.device(first.device))
            return self.operation(*args, **kwargs)


BACKENDS: tuple[Backend, ...] = (
    Backend.of("cpu-int8", "cpu", ("integer",), cpu_int8),
    Backend.of("triton", "cuda", ("integer", "fp8"), triton_backend),
    Backend.of("triton-weight-only", "cuda", ("values",), weight_only_backend),
    Backend.of("reference", "any", ("integer", "fp8", "values"), reference),
)


def select(
    device: str,
    activation_bits: int,
    forced: str | None = None,
    weights: Weights = (4, None, True),
    activation_format: ActivationFormat = "int",
) -> Backend:
    """The backend for a device type ("cpu", "cuda", ...), activation width and format and kind of weights; `forced`
    names one instead.

    Raises `QuantExpertsError` where the forced backend does not exist or does not apply.
    """
    wanted: Activations = "values" if activation_bits == 16 else "integer" if activation_format == "int" else "fp8"
    fitting = [
        b
        for b in BACKENDS
        if b.device in (device, "any") and wanted in b.activations and b.fits(weights) and b.usable(wanted)
    ]
    for backend in fitting:
        if forced in (None, backend.name):
            return backend
    names = ", ".join(b.name for b in fitting)
    activations = activation_bits if activation_format == "int" else activation_format
    raise QuantExpertsError(f"Backend '{forced}' cannot run A{activations} on {device}: choose one of {names}.")
