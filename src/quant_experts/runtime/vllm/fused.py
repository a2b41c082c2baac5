"""The module inside a layer of vLLM: the layer's linears, quantized, with their outputs side by side.

It holds the same `QuantizedLinear` and `InputGroup` as a model in `transformers`, and so computes the same. vLLM's
loaders know parameters only, by the names of the layer that they belong to, and say for which of its linears a tensor
is. So until all is loaded the layer has an empty parameter under each name, an inlet, that hands what comes to the
right linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from quant_experts.checkpoint.schema import GROUP_CHILD
from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.modules import InputGroup, QuantizedLinear
from quant_experts.runtime.vllm.plan import Part

GUARD = "weight"
"""Name of the tensor that stops loaders without this package: empty in our files."""
Spread = dict[tuple[str, ...], list["FusedLinears"]]
"""Of input groups whose linears are in several layers: by their linears, those layers."""
Shard = int | str | tuple[int, ...] | None
"""How vLLM says for which linear of a layer a tensor is: by its piece, its pieces, "q", "k" or "v", or None in a layer
of one."""


class FusedLinears(nn.Module):
    """Quantized linears that read one input x (..., K) -> (..., sum of N), in x's dtype, biases added.

    Where vLLM computes the linears of an input group in several layers, each has a group of its own, and the tensors
    that they share are handed to all.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        scheme: Scheme,
        pieces: Sequence[int],
        in_features: int,
        spread: Spread | None = None,
    ) -> None:
        """pieces: output channels of the layer's pieces as vLLM sees them, of which a linear may be several. spread:
        the same object for all layers of a model.

        Raises `QuantExpertsError` if it is not clear which pieces a linear is.
        """
        super().__init__()
        self.parts, self.names = tuple(parts), [part.name for part in parts]
        self._spread: Spread = {} if spread is None else spread
        self._place = {name: place for place, name in enumerate(self.names)}
        rows, self._place_of_piece = _rows_and_places(parts, pieces)
        made: dict[str, QuantizedLinear] = {}
        for spec in {part.spec.linears: part.spec for part in parts}.values():
            here = tuple(name for name in spec.linears if name in self._place)
            if here != spec.linears:
                self._spread.setdefault(spec.linears, []).append(self)
                spec = spec.model_copy(update={"linears": here})
            group: InputGroup | None = None
            for name in here:  # in the group's order: the first owns the shared tensors
                shape = (rows[self._place[name]], in_features)
                made[name] = QuantizedLinear(spec, scheme, shape, bias=None, group=group)
                group = group or made[name].group
        self.linears = nn.ModuleList(made[name] for name in self.names)
        self.guarded = any(part.guarded for part in parts)
        self._one_group = list(made) == self.names and len({part.spec.linears for part in parts}) == 1
        self._final = False
        self._awaited = {
            (place, key) for place, linear in enumerate(self.quantized()) for key, _ in linear.named_buffers()
        }

    def quantized(self) -> list[QuantizedLinear]:
        """The linears in the order of the outputs."""
        return [linear for linear in self.linears if isinstance(linear, QuantizedLinear)]

    def add_inlets(self, layer: nn.Module) -> None:
        """Give a layer of vLLM an empty parameter for each tensor of the linears, named as in files, which loads it."""
        for place, linear in enumerate(self.quantized()):
            for key, value in linear.named_buffers():
                if _is_shared(key) and self._name_in_files(place, key) not in self.names:
                    continue  # comes by another layer
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
        fit, and for any once all is loaded."""
        self._refuse_if_final()
        place = self._place_of(key, shard)
        if key == GUARD:
            if value.numel():
                raise QuantExpertsError(
                    f"Tensor '{self.names[place]}.{key}' is in full precision, config.json says it is quantized."
                )
            return
        self._fill(place, key, value)
        spec = self.parts[place].spec
        for other in self._spread.get(spec.linears, ()) if _is_shared(key) else ():
            if other is not self:
                other._fill(next(other._place[name] for name in spec.linears if name in other._place), key, value)

    def _fill(self, place: int, key: str, value: Tensor) -> None:
        """Copy a tensor that was waited for, or name it if it does not fit."""
        name = f"{self.names[place]}.{key}"
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
        shards = shard if isinstance(shard, tuple) else (shard,)
        pieces = ["qkv".find(one) if isinstance(one, str) and len(one) == 1 else one for one in shards]
        if all(isinstance(piece, int) and 0 <= piece < len(self._place_of_piece) for piece in pieces):
            places = {self._place_of_piece[piece] for piece in pieces if isinstance(piece, int)}
            if len(places) == 1:
                return places.pop()
        raise QuantExpertsError(
            f"vLLM loads '{key}' into piece {shard!r} of the layer of {', '.join(self.names)}, which is not supported: "
            "load the checkpoint with transformers."
        )

    def _refuse_if_final(self) -> None:
        if self._final:
            raise QuantExpertsError("Weights of a quantized model are loaded once: start vLLM again.")

    def _name_in_files(self, place: int, key: str) -> str:
        """The linear under which files have a tensor of the linear at a place, or of its group."""
        return self.parts[place].spec.linears[0] if _is_shared(key) else self.names[place]

    def finalize(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Check that all was loaded and lay it out for inputs of a dtype.

        bias (sum of N,): added by the linears, as in `transformers` before their outputs are rounded to x's dtype.
        Raises `QuantExpertsError` that names a tensor which is missing or damaged, and when it is called again.
        """
        self._refuse_if_final()
        if self._awaited:
            place, key = min(self._awaited)
            raise QuantExpertsError(
                f"Tensor '{self._name_in_files(place, key)}.{key}' is missing from what vLLM has read: download or "
                "quantize the checkpoint again, and leave vLLM's load_format as it is."
            )
        self._final = True
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


def _rows_and_places(parts: Sequence[Part], pieces: Sequence[int]) -> tuple[list[int], list[int]]:
    """-> output channels of each linear, and of each piece the place of the linear that it is of."""
    if len(parts) == 1:
        return [sum(pieces)], [0] * len(pieces)
    if len(parts) == len(pieces):
        return list(pieces), list(range(len(pieces)))
    rows = [part.rows or 0 for part in parts]
    ends, piece_ends = list(accumulate(rows)), list(accumulate(pieces))
    if not all(rows) or ends[-1] != piece_ends[-1] or not set(ends) <= set(piece_ends):
        raise QuantExpertsError(
            f"vLLM computes {', '.join(part.name for part in parts)} in one layer of {len(pieces)} pieces, which is "
            "not supported: load the checkpoint with transformers."
        )
    return rows, [sum(end < piece_end for end in ends) for piece_end in piece_ends]


def _is_shared(key: str) -> bool:
    """Whether a tensor is one that the linears of a group share."""
    return key.startswith(f"{GROUP_CHILD}.")


def _owner(layer: nn.Module, key: str) -> tuple[nn.Module, str]:
    """(the layer, or its child for what a group shares; the tensor's name in it)"""
    child, _, leaf = key.rpartition(".")
    if child and child not in layer._modules:
        layer.add_module(child, nn.Module())
    return layer.get_submodule(child), leaf
