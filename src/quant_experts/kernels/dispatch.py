"""Which backend computes what: one explicit table, read top to bottom, the first row that fits wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quant_experts.errors import QuantExpertsError
from quant_experts.kernels import cpu_int8, reference
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared


@dataclass(frozen=True)
class Backend:
    """Two functions that together compute a quantized group, and where they apply."""

    name: str
    device: Literal["cpu", "any"]
    activations: Literal["integer", "any"]
    prepare: Callable[[Tensor, GroupOperands], Prepared]
    linear: Callable[[Prepared, LinearOperands], Tensor]
    usable: Callable[[], bool]


BACKENDS: tuple[Backend, ...] = (
    Backend("cpu-int8", "cpu", "integer", cpu_int8.prepare, cpu_int8.linear, cpu_int8.is_exact),
    Backend("reference", "any", "any", reference.prepare, reference.linear, lambda: True),
)


def select(device: str, activation_bits: int, forced: str | None = None) -> Backend:
    """The backend for a device type ("cpu", "cuda", ...) and activation width; `forced` names one instead.

    Raises `QuantExpertsError` where the forced backend does not exist or does not apply.
    """
    fitting = [
        b
        for b in BACKENDS
        if b.device in (device, "any") and (b.activations == "any" or activation_bits < 16) and b.usable()
    ]
    for backend in fitting:
        if forced in (None, backend.name):
            return backend
    names = ", ".join(b.name for b in fitting)
    raise QuantExpertsError(f"Backend '{forced}' cannot run A{activation_bits} on {device}: choose one of {names}.")
