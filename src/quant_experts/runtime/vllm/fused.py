"""The module inside a layer of vLLM: the layer's linears, quantized, with their outputs side by side.

It holds the same `QuantizedLinear` and `InputGroup` as a model in `transformers`, and so computes the same. vLLM's
loaders know parameters only, by the names of the layer that they belong to, and say for which of its linears a tensor
is. So until all is loaded the layer has an empty parameter under each name, an inlet, that hands what comes to the
right linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_experts.checkpoint.schema import GROUP_CHILD
from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.modules import InputGroup, QuantizedLinear
from quant_experts.runtime.vllm.plan import Part

GUARD = "weight"
"""Name of the tensor that stops loaders without this package: empty in our files."""
Shard = int | str | tuple[int, ...] | None
"""How vLLM says for which linear of a layer a tensor is: its place, "q", "k" or "v", or None in a layer of one."""


class FusedLinears(nn.Module):
    """Quantized linears that read one input x (..., K) -> (..., sum of N), in x's dtype, biases added."""

    def __init__(self, parts: Sequence[Part], scheme: Scheme, rows: Sequence[int], in_features: int) -> None:
        """rows: output channels of the layer's pieces as vLLM sees them; a single linear may be all of them.

        Raises `QuantExpertsError` if there are more pieces than linears.
        """
        super().__init__()
        self.names = [part.name for part in parts]
        if len(parts) == 1:
            rows = [sum(rows)]
        if len(parts) != len(rows):
            raise QuantExpertsError(
                f"vLLM computes {', '.join(self.names)} in one layer of {len(rows)} pieces, which is not supported: "
                "load the checkpoint with transformers."
            )
        self._place = {name: place for place, name in enumerate(self.names)}
        made: dict[str, QuantizedLinear] = {}
        for spec in {part.spec.linears: part.spec for part in parts}.values():
            group: InputGroup | None = None
            for name in spec.linears:  # in the group's order: the first owns the shared tensors
                shape = (rows[self._place[name]], in_features)
                made[name] = QuantizedLinear(spec, scheme, shape, bias=None, group=group)
                group = group or made[name].group
        self.linears = nn.ModuleList(made[name] for name in self.names)
        self.guarded = any(part.guarded for part in parts)
        self._one_group = tuple(self.names) == parts[0].spec.linears
        self._awaited = {
            (place, key) for place, linear in enumerate(self.quantized()) for key, _ in linear.named_buffers()
        }

    def quantized(self) -> list[QuantizedLinear]:
        """The linears in the order of the outputs."""
        return [linear for linear in self.linears if isinstance(linear, QuantizedLinear)]

    def add_inlets(self, layer: nn.Module) -> None:
        """Give a layer of vLLM an empty parameter for each tensor of the linears, named as in files, which loads it."""
        for linear in self.quantized():
            for key, value in linear.named_buffers():
                owner, leaf = _owner(layer, key)
                if leaf not in owner._parameters:
                    owner.register_parameter(leaf, self._inlet(key, value.dtype))
        if self.guarded:
            layer.register_parameter(GUARD, self._inlet(GUARD, torch.float32))

    def remove_inlets(self, layer: nn.Module) -> None:
        """Take them away again."""
        for key in {key for linear in self.quantized() for key, _ in linear.named_buffers()} | {GUARD}:
            owner, leaf = _owner(layer, key)
            owner._parameters.pop(leaf, None)
        layer._modules.pop(GROUP_CHILD, None)

    def _inlet(self, key: str, dtype: torch.dtype) -> nn.Parameter:
        def weight_loader(inlet: nn.Parameter, value: Tensor, shard: Shard = None) -> None:
            self.load(key, value, shard)

        inlet = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        inlet.weight_loader = weight_loader  # type: ignore[attr-defined]  # vLLM's convention
        return inlet

    def load(self, key: str, value: Tensor, shard: Shard = None) -> None:
        """Fill a tensor of the linear that `shard` says. Raises `QuantExpertsError` that names a tensor which does not
        fit."""
        place = self._place_of(key, shard)
        name = f"{self.names[place]}.{key}"
        if key == GUARD:
            if value.numel():
                raise QuantExpertsError(f"Tensor '{name}' is in full precision, config.json says it is quantized.")
            return
        buffers = dict(self.quantized()[place].named_buffers())
        if key not in buffers:
            raise QuantExpertsError(f"Tensor '{name}' is not one that config.json tells of: quantize again.")
        wanted = buffers[key]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise QuantExpertsError(
                f"Tensor '{name}' comes as {value.dtype} {list(value.shape)}, the layer needs {wanted.dtype} "
                f"{list(wanted.shape)}: the checkpoint's files do not belong together, or vLLM splits this layer, "
                "which is not supported."
            )
        wanted.copy_(value)
        self._awaited.discard((place, key))

    def _place_of(self, key: str, shard: Shard) -> int:
        if len(self.names) == 1:
            return 0
        place = "qkv".find(shard) if isinstance(shard, str) and len(shard) == 1 else shard
        if isinstance(place, int) and 0 <= place < len(self.names):
            return place
        raise QuantExpertsError(
            f"vLLM loads '{key}' into piece {shard!r} of the layer of {', '.join(self.names)}, which is not supported: "
            "load the checkpoint with transformers."
        )

    def finalize(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Check that all was loaded and lay it out for inputs of a dtype.

        bias (sum of N,): added by the linears, as in `transformers` before their outputs are rounded to x's dtype.
        Raises `QuantExpertsError` that names a tensor which is missing or damaged.
        """
        if self._awaited:
            place, key = min(self._awaited)
            raise QuantExpertsError(
                f"Tensor '{self.names[place]}.{key}' is missing from the checkpoint: download or quantize it again."
            )
        linears = self.quantized()
        biases = [None] * len(linears) if bias is None else bias.detach().split([n.out_features for n in linears])
        for name, linear, part in zip(self.names, linears, biases, strict=True):
            linear.finalize(name)
            linear.bias = None if part is None else nn.Parameter(part, requires_grad=False)
        for linear in linears:
            if linear.place == 0:
                linear.group.lay_out(linear.weight_scale.device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """One call a group. Linears of several groups, or in another order than their group's, take theirs from it."""
        first = self.quantized()[0]
        parts = first.group.outputs(x) if self._one_group else [linear(x) for linear in self.quantized()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _owner(layer: nn.Module, key: str) -> tuple[nn.Module, str]:
    """(the layer, or its child for what a group shares; the tensor's name in it)"""
    child, _, leaf = key.rpartition(".")
    if child and child not in layer._modules:
        layer.add_module(child, nn.Module())
    return layer.get_submodule(child), leaf
