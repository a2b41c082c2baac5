"""The modules that stand in a quantized model: `QuantizedLinear` in place of each linear, `InputGroup` beside the first
of a group.

A group computes the outputs of all its linears at once, whichever of them asks first; the others take theirs from that
result. The group's tensors are registered once, under the first linear; the others hold a plain reference.

`torch.compile` sees one operation for each group, `quant_experts::group_outputs`. It finds the group by a number:
packed weights are objects of a backend, which no operation could take as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from quant_experts.checkpoint.packing import pack, unpack
from quant_experts.checkpoint.schema import GROUP_CHILD, GroupSpec, TensorSpecs, group_tensors, linear_tensors
from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.kernels.dispatch import Backend, Layout, select
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

FACTOR_TENSORS = {
    end: (f"shared_{end}", f"routed_{end}", f"shared_{end}_scale", f"routed_{end}_scale") for end in ("down", "up")
}
GROUP_TENSORS = ("smooth_scale", *FACTOR_TENSORS["down"], "router_weight", "router_bias")
LINEAR_TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", *FACTOR_TENSORS["up"])


def _register(module: nn.Module, names: Sequence[str], specs: TensorSpecs) -> None:
    """A zero buffer for each tensor that the format has here, None for the others."""
    for name in names:
        module.register_buffer(name, torch.zeros(specs[name][0], dtype=specs[name][1]) if name in specs else None)


def _factor(module: nn.Module, name: str) -> Factor | None:
    """An expert's factor from a module's buffers."""
    values = module._buffers[name]
    return None if values is None else Factor(values, module._buffers[f"{name}_scale"])


class _Stack(NamedTuple):
    """A group's tensors and its stacked weights, as a backend lays them out that wants that."""

    packed: Any
    layout: Layout
    forced: str | None
    """`InputGroup.backend` then."""
    device: str
    """Type of the device."""
    dtype: torch.dtype
    """Of the input that they were laid out for."""

    def serves(self, x: Tensor, forced: str | None) -> bool:
        """Whether they fit an input, still: float32 wants more bits than a layout for other types keeps."""
        wider = x.dtype == torch.float32 and self.dtype != torch.float32
        return not wider and self.device == x.device.type and self.forced == forced


class InputGroup(nn.Module):
    """What the linears of one group share: smoothing, expert down factors and the router. Linears call `forward`
    itself, so that hooks of `torch.nn` on a group are not called, those on linears are."""

    smooth_scale: Tensor | None
    router_weight: Tensor | None
    router_bias: Tensor | None

    def __init__(self, spec: GroupSpec, scheme: Scheme, in_features: int) -> None:
        super().__init__()
        self.spec, self.scheme, self.in_features = spec, scheme, in_features
        if spec.rotation and in_features % spec.rotation:
            raise QuantExpertsError(
                f"Group '{spec.linears[0]}' has {in_features} input channels, which blocks of {spec.rotation} do not "
                "divide: the checkpoint is damaged."
            )
        _register(self, GROUP_TENSORS, group_tensors(spec, in_features))
        self.backend: str | None = None
        """Name of a backend to use instead of the table's choice."""
        self._last: list[tuple[Tensor, int, dict[int, Tensor]] | None] = [None]
        """(input, its version, outputs that linears have yet to take, by their place in the group), in a list, because
        setting an attribute of a module takes long."""
        self._linears: list[QuantizedLinear] = []
        self._stack: _Stack | None = None
        self._register_number()

    def _register_number(self) -> None:
        self.number = next(_numbers)
        _groups[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a group of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._last = [None]
        self._register_number()

    def select_backend(self, device: torch.device) -> Backend:
        """The backend that serves this group on a device."""
        scheme = self.scheme
        weights = (scheme.weight_bits, scheme.group_size, scheme.symmetric)
        return select(device.type, scheme.activation_bits, self.backend, weights, scheme.activation_format)

    def attach(self, linear: QuantizedLinear) -> int:
        """Called by each linear of the group, in order. -> its place."""
        self._linears.append(linear)
        return len(self._linears) - 1

    def widths(self) -> list[int]:
        """Output channels of each linear."""
        return [linear.out_features for linear in self._linears]

    def forward(self, x: Tensor, place: int) -> Tensor:
        """x (..., K) -> the output (..., N) of the linear at that place, in x's dtype.

        Outputs are computed once for all linears that read the same input. Each takes its own once: asking again means
        that a new input came in the same tensor. (`torch.compile` sees no versions: there an input must not be changed
        in place between two linears of a group.)
        """
        tracing = torch.compiler.is_compiling()
        version = 0 if tracing or x.is_inference() else x._version
        last, self._last[0] = self._last[0], None
        if last is None or last[0] is not x or last[1] != version or place not in last[2]:
            # No gradient goes through rounding: traced outputs are constants, like those of a group that runs eagerly.
            parts = [group_outputs(x.detach(), self.number)] if tracing else self.outputs(x)
            if len(self._linears) == 1:
                return parts[0]
            if len(parts) == 1:
                parts = list(parts[0].split_with_sizes(self.widths(), -1))
            last = (x, version, dict(enumerate(parts)))
        y = last[2].pop(place)
        # Dropped after the last linear's use, so that no activation outlives its layer.
        if last[2]:
            self._last[0] = last
        return y

    def outputs(self, x: Tensor) -> list[Tensor]:
        """x (..., K) -> in x's dtype one tensor (..., N) for each linear, or one for all of them side by side where the
        backend stacks their weights. Raises `RuntimeError` if x has another width."""
        if x.shape[-1:] != (self.in_features,):
            raise RuntimeError(
                f"The input has the shape {tuple(x.shape)}, the layer takes {self.in_features} channels."
            )
        if self._stack is None or not self._stack.serves(x, self.backend):
            backend = self.lay_out(x.device, x.dtype)
            if self._stack is None:
                prepared = backend.prepare(x.reshape(-1, self.in_features), self.operands())
                parts = [backend.linear(prepared, linear.operands()) for linear in self._linears]
                return [y.to(x.dtype).view(*x.shape[:-1], y.shape[1]) for y in parts]
        return [self._stack.layout.apply(x, self._stack.packed)]

    def lay_out(self, device: torch.device, dtype: torch.dtype) -> Backend:
        """Put the weights into the form that the backend for such inputs has for them, if it has one of its own. The
        first call does so; servers ask for it before, so that they can count on the memory that is left."""
        self.unstack()
        backend = self.select_backend(device)
        if backend.layout is not None:
            linears = [linear.operands() for linear in self._linears]
            packed = backend.layout.pack(self.operands(), linears, dtype)
            self._stack = _Stack(packed, backend.layout, self.backend, device.type, dtype)
            for linear in self._linears:  # the layout holds them in fewer bytes
                linear.weight_codes = None
        return backend

    def unstack(self) -> None:
        """Give the linears their codes back, before they move, are saved or run on another backend."""
        if self._stack is not None:
            for linear in self._linears:
                linear.weight_codes = linear.stored_codes()
            self._stack = None

    def stacked_codes(self, linear: QuantizedLinear) -> Tensor:
        """A linear's codes (N, K) int8 out of the backend's layout."""
        assert self._stack is not None
        start = sum(self.widths()[: linear.place])
        rows = slice(start, start + linear.out_features)
        return self._stack.layout.codes(self._stack.packed, rows, self.in_features)

    def _apply(self, fn: Any, recurse: bool = True) -> InputGroup:
        self.unstack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def operands(self) -> GroupOperands:
        """The tensors as kernels take them."""
        return GroupOperands(
            self.scheme.activation_bits,
            self.smooth_scale,
            self.spec.rotation,
            _factor(self, "shared_down"),
            _factor(self, "routed_down"),
            self.router_weight,
            self.router_bias,
            shared_reads_codes=self.spec.shared_reads == "codes" and not self.scheme.weight_only,
            activation_format=self.scheme.activation_format,
        )


_numbers = count()
_groups: WeakValueDictionary[int, InputGroup] = WeakValueDictionary()
"""Every group that is alive, by its number."""


@torch.library.custom_op("quant_experts::group_outputs", mutates_args=(), schema="(Tensor x, int number) -> Tensor")
def group_outputs(x: Tensor, number: int) -> Tensor:
    """What tracing sees of the group with that number: x (..., K) -> the outputs of its linears side by side
    (..., sum of N) in x's dtype."""
    parts = _groups[number].outputs(x)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@group_outputs.register_fake
def _shape(x: Tensor, number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(_groups[number].widths()))


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights and the up factors of its group's experts. x (..., K) -> (..., N) in x's
    dtype.

    `weight_packed` is what files hold. `finalize`, called once after loading, replaces it in memory by int8 codes, the
    operand of the integer kernels; `state_dict` packs them again. Packed zero points are few: they stay, beside int8
    ones.
    """

    bias: nn.Parameter | None
    weight_packed: Tensor | None
    weight_codes: Tensor | None
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None
    zero_codes: Tensor | None
    """(N, G) int8, unpacked"""

    def __init__(
        self,
        spec: GroupSpec,
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        bias: nn.Parameter | None,
        group: InputGroup | None = None,
    ) -> None:
        """shape is (N, K). Without `group` this linear is the group's first and owns a new one."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.scheme = scheme
        _register(self, LINEAR_TENSORS, linear_tensors(spec, scheme, *shape))
        self.register_buffer("weight_codes", None, persistent=False)
        self.register_buffer("zero_codes", None, persistent=False)
        self.register_parameter("bias", bias)
        self._group = (group,) if group is not None else None  # in a tuple: not registered a second time
        if group is None:
            self.add_module(GROUP_CHILD, InputGroup(spec, scheme, self.in_features))
        self.place = self.group.attach(self)

    @property
    def group(self) -> InputGroup:
        """The input group that this linear reads, its own or another linear's."""
        group = self._modules[GROUP_CHILD] if self._group is None else self._group[0]
        assert isinstance(group, InputGroup)
        return group

    def finalize(self, name: str) -> None:
        """Unpack the codes and check what was loaded. Raises `QuantExpertsError` that names the offending tensor."""
        if self.weight_packed is None:
            return
        if self.weight_shape.tolist() != [self.out_features, self.in_features]:
            raise QuantExpertsError(
                f"Tensor '{name}.weight_shape' says {self.weight_shape.tolist()}, the model needs "
                f"{[self.out_features, self.in_features]}: the checkpoint does not belong to this model."
            )
        owned = [(f"{name}.{key}", value) for key, value in self.named_buffers()]
        for key, value in owned:
            if value.is_floating_point() and not value.isfinite().all():
                raise QuantExpertsError(f"Tensor '{key}' holds NaN or infinity: the checkpoint is damaged.")
        self.weight_codes = unpack(self.weight_packed, self.scheme.weight_bits, self.in_features)
        self.weight_packed = None
        self._unpack_zero_point()

    def _unpack_zero_point(self) -> None:
        if self.weight_zero_point is not None:
            self.zero_codes = unpack(self.weight_zero_point, self.scheme.weight_bits, self.out_features).T.contiguous()

    def operands(self) -> LinearOperands:
        """The tensors as kernels take them."""
        return LinearOperands(
            self.stored_codes(),
            self.weight_scale.float(),
            self.zero_codes,
            self.scheme.group_size,
            _factor(self, "shared_up"),
            _factor(self, "routed_up"),
            self.bias,
        )

    def stored_codes(self) -> Tensor:
        """(N, K) int8, wherever they lie."""
        if self.weight_codes is None:
            assert self.weight_packed is None, "finalize() was not called"
            return self.group.stacked_codes(self)
        return self.weight_codes

    def forward(self, x: Tensor) -> Tensor:
        """y = base product + shared expert + routed expert + bias."""
        return self.group.forward(x, self.place)  # a part of this module: hooks are called once, for this one

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_packed is None:
            destination[f"{prefix}weight_packed"] = pack(self.stored_codes(), self.scheme.weight_bits)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        self.group.unstack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Read packed codes into a module that has unpacked its own."""
        self.group.unstack()
        key = f"{prefix}weight_packed"
        if self.weight_codes is not None and key in state_dict:
            codes = unpack(state_dict[key], self.scheme.weight_bits, self.in_features)
            self.weight_codes.copy_(codes)
            state_dict = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.zero_codes is not None:
            self._unpack_zero_point()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


def swap_linears(model: nn.Module, spec: GroupSpec, scheme: Scheme) -> dict[str, QuantizedLinear]:
    """Replace a group's linears in a model by empty quantized modules, on the current device context. -> modules by
    name.

    Raises `QuantExpertsError` if one of them is not a linear of the model.
    """
    modules: dict[str, QuantizedLinear] = {}
    group: InputGroup | None = None
    for name in spec.linears:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise QuantExpertsError(f"The checkpoint quantizes '{name}', which is not a linear layer of this model.")
        shape = (linear.out_features, linear.in_features)
        modules[name] = QuantizedLinear(spec, scheme, shape, bias=linear.bias, group=group)
        group = group or modules[name].group
        model.set_submodule(name, modules[name])
    return modules


def install_groups(
    model: nn.Module,
    specs: Sequence[GroupSpec],
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    *,
    oracle: bool = False,
) -> dict[str, QuantizedLinear]:
    """Swap groups into a model that is in memory and fill them from tensors by name; biases stay. -> modules by
    name.

    oracle: on a GPU compute in float32 throughout, as quantization does: what it measures, and feeds to the next block,
    shall not depend on the roundings of fast kernels.
    """
    devices = {name: next(model.get_submodule(name).parameters()).device for spec in specs for name in spec.linears}
    modules: dict[str, QuantizedLinear] = {}
    for spec in specs:
        with torch.device("meta"):
            modules |= swap_linears(model, spec, scheme)
    for name, module in modules.items():
        for key, _ in list(module.named_buffers()):
            owner, leaf = (module, key) if "." not in key else (module.group, key.rpartition(".")[2])
            tensor = tensors[f"{name}.{key}"]
            owner._buffers[leaf] = tensor if devices[name].type == "meta" else tensor.to(devices[name])
    for name, module in modules.items():
        module.finalize(name)
        if oracle and module.weight_scale.is_cuda:
            module.group.backend = "reference"
    return modules
