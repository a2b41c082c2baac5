"""A group's launches, recorded once and repeated for other inputs and other groups of the same sizes.

To decide on a group's launches takes Python longer than it takes the GPU to run them, up to about a thousand tokens,
and everything decided depends on sizes and types alone. What differs from call to call are addresses: of the input, the
output, what is allocated in between, and the group's own tensors. So the first call of each kind runs as it is written
while its launches are noted; later ones write the new addresses into the noted arguments and call the driver.

A call is repeated only if its launches explain it entirely: every address that they were given is one of those, and
nothing else ran. Otherwise it keeps running as it is written, with the same results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from functools import cached_property
from itertools import count
from struct import Struct
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant_experts.kernels.gpu import cuda, launch
from quant_experts.kernels.gpu.caching import CopiedByFields
from quant_experts.kernels.gpu.launch import Boxes

KEPT = 2048
"""Programs that are kept: one for each kind of group, number of tokens and type."""
ATTEMPTS = 3
"""Calls of a kind that are noted at most: the first ones may also make workspaces."""
ALIGNED = 256
"""Bytes to a multiple of which whatever is allocated in a call begins, in the one tensor that takes its place."""
MAPS_KEPT = 1024
"""Tensor maps that are kept of boxes that differ in addresses alone."""
FIXED, INPUT, OUTPUT, WORK, OWN = range(5)
"""Where an address comes from: from nowhere, and the first of a group's own tensors."""


FORMATS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
"""Numbers among a kernel's arguments."""


class Operands(NamedTuple):
    """What a call reads beside its input."""

    number: int
    """Of its kind: equal for groups that differ in addresses alone."""
    tensors: tuple[Tensor, ...]
    """Not their addresses: copies of a group have others."""


class Repeatable(CopiedByFields):
    """A base of dataclasses that hold all that a call reads beside its input."""

    @cached_property
    def operands(self) -> Operands | None:
        return operands(self)


_numbers: dict[Hashable, int] = {}
_next_number = count()


def operands(packed: Any) -> Operands | None:
    """Of dataclasses that hold tensors, numbers and what hashes; None where they hold what does not, or a tensor that a
    launch would not take as it is."""
    tensors: list[Tensor] = []

    def described(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            tensors.append(value)
            return value.dtype, tuple(value.shape), value.stride(), value.device
        if is_dataclass(value) and not isinstance(value, type):
            return type(value), tuple(described(getattr(value, field.name)) for field in fields(value))
        return type(value), value

    try:
        number = _numbers.setdefault(described(packed), next(_next_number))
    except TypeError:
        return None
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    apart = len(set(addresses)) == len(addresses)  # an address must say which tensor it is
    if not apart or any(address % 16 for address in addresses) or not all(t.is_contiguous() for t in tensors):
        return None
    return Operands(number, tuple(tensors))


_programs: dict[Hashable, Program | int] = {}
"""By kind of group, numbers and channels of the input, type and device; or how often that was noted in vain."""


def run(work: Callable[[Tensor, Any], Tensor], x: Tensor, packed: Repeatable) -> Tensor:
    """work(x, packed) of x (M, K), for x (..., K) as (..., N), by its recorded launches where there are such."""
    cuda.enter(x.device)
    own = packed.operands
    if own is None or not x.numel() or not launch.repeatable(x.device) or cuda.driver() is None:
        return _anew(work, x, packed)
    x = x.contiguous()
    if x.data_ptr() % 16:
        return _anew(work, x, packed)
    key = (own.number, x.numel(), x.shape[-1], x.dtype, x.device)  # a layout knows its channels only up to padding
    program = _programs.get(key, 0)
    if isinstance(program, Program):
        return program.repeat(x, own.tensors)
    if program >= ATTEMPTS:
        return _anew(work, x, packed)
    with _Allocations() as allocations, launch.noted() as launches:
        y = work(_rows(x), packed)
    made = None if allocations.others else program_of(launches, x, y, own, allocations.found)
    if len(_programs) >= KEPT:
        for old in list(_programs)[: KEPT // 2]:
            _programs.pop(old, None)
    _programs[key] = program + 1 if made is None else made
    return _shaped(y, x)


def _anew(work: Callable[[Tensor, Any], Tensor], x: Tensor, packed: Repeatable) -> Tensor:
    return _shaped(work(_rows(x), packed), x)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) as the output for x (..., K)."""
    return y.view(*x.shape[:-1], y.shape[1])


class _Allocations(TorchDispatchMode):
    """Watches what PyTorch does in a call: tensors allocated and not written, views, or others. What is a view by its
    declaration may have copied (`to`, `contiguous`), which in inference mode is all that is seen of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []
        """Kept, so that no two of them share their memory."""
        self.others = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty):
            self.found.append(result)
        elif not (function.is_view and _shares_memory(result, args)):
            self.others = True
        return result


def _shares_memory(result: Any, args: tuple[Any, ...]) -> bool:
    first = args[0] if args else None
    if not (isinstance(result, Tensor) and isinstance(first, Tensor)):
        return False
    return result.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


class _Pointer(NamedTuple):
    """An address that changes."""

    source: int
    offset: int


class _Known(dict[int, bytes]):
    """Tensor maps by address, of boxes that are equal otherwise. Programs share them."""


_known: WeakValueDictionary[tuple[Any, ...], _Known] = WeakValueDictionary()
"""By all else that `cuda.tensor_map` takes."""


class _Map(NamedTuple):
    """A tensor map that changes: what it maps, by all else that `cuda.tensor_map` takes, and where it stands."""

    source: int
    offset: int
    boxes: tuple[Any, ...]
    place: slice
    known: _Known


class _Arguments:
    """Of all launches of a program: what differs from call to call, each once, and what is fixed."""

    POINTER, MAP, AS_IS = range(3)

    def __init__(self) -> None:
        self.pointers: dict[_Pointer, int] = {}
        self.maps: dict[tuple[int, int, tuple[Any, ...]], int] = {}
        self.fixed = bytearray()

    def place(self, argument: _Argument, source_of: Callable[[int], tuple[int, int]]) -> tuple[int, int]:
        """-> which of the three an argument is of, and its first byte among those."""
        value = argument.value
        if isinstance(value, Boxes):
            box = (*source_of(value.base.data_ptr()), boxes_of(value))
            return self.MAP, self.maps.setdefault(box, len(self.maps)) * cuda.MAP_BYTES
        if isinstance(value, int) and value:
            pointer = _Pointer(*source_of(value))
            if pointer.source != FIXED:
                return self.POINTER, self.pointers.setdefault(pointer, len(self.pointers)) * 8
            value = pointer.offset
        start = len(self.fixed)
        self.fixed += (value.to_bytes(8, "little") if isinstance(value, int) else bytes(value)).ljust(8, b"\0")
        return self.AS_IS, start


class _UnexplainedError(Exception):
    """A launch is given something that cannot be repeated."""


_turns: dict[torch.device, Lock] = {}
"""Threads that use one GPU take turns: a call writes its addresses into a program, and its launches follow one another.
Not those of several GPUs: a launch waits where a GPU has enough to do, perhaps for what another thread would start."""


class Program:
    """Launches that are repeated, and what of their arguments changes."""

    def __init__(self, width: int, like: Tensor, work_bytes: int, arguments: _Arguments) -> None:
        self.width, self.device, self.work_bytes = width, like.device, work_bytes
        self.empty = torch.empty(0, dtype=torch.uint8, device=like.device)  # `new_empty` takes less than `empty`
        self.launches: list[tuple[cuda.Config, Any, Any, Any]] = []
        """Configuration, a reference to it, the kernel, addresses of its arguments."""
        self.compiled: list[Any] = []
        """Kernels, which stay loaded."""
        self.stream = 0
        self.turn = _turns.setdefault(like.device, Lock())
        self.pointers = list(arguments.pointers)
        self.write = Struct(f"={len(self.pointers)}Q").pack_into
        first_map = -(-8 * len(self.pointers) // cuda.MAP_ALIGNED) * cuda.MAP_ALIGNED
        self.maps: list[_Map] = []
        for i, (source, offset, boxes) in enumerate(arguments.maps):
            place = slice(first_map + i * cuda.MAP_BYTES, first_map + (i + 1) * cuda.MAP_BYTES)
            self.maps.append(_Map(source, offset, boxes, place, _known.setdefault(boxes, _Known())))
        size = first_map + len(self.maps) * cuda.MAP_BYTES
        memory = bytearray(size + len(arguments.fixed) + cuda.MAP_ALIGNED)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        shift = -address % cuda.MAP_ALIGNED
        self.arguments = memoryview(memory)[shift:]
        """Of all launches: pointers, tensor maps, and what is fixed."""
        self.arguments[size : size + len(arguments.fixed)] = arguments.fixed
        self.starts = (address + shift, address + shift + first_map, address + shift + size)
        """Addresses at which those begin."""

    def add(self, compiled: Any, config: cuda.Config, places: list[tuple[int, int]]) -> None:
        """A launch of a kernel, whose arguments are at those places (`_Arguments.place`)."""
        given = (ctypes.c_void_p * len(places))(*[self.starts[kind] + byte for kind, byte in places])
        self.launches.append((config, ctypes.byref(config), ctypes.c_void_p(compiled.function), given))
        self.compiled.append(compiled)

    def repeat(self, x: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        """The output for x and a group's tensors."""
        y = x.new_empty(*x.shape[:-1], self.width)
        work = self.empty.new_empty(self.work_bytes) if self.work_bytes else y
        addresses = [0, x.data_ptr(), y.data_ptr(), work.data_ptr(), *[tensor.data_ptr() for tensor in own]]
        stream, call, arguments = launch.current_stream(self.device), cuda.driver().cuLaunchKernelEx, self.arguments
        pointers = [addresses[source] + offset for source, offset in self.pointers]
        with self.turn:
            self.write(arguments, 0, *pointers)
            for source, offset, boxes, place, known in self.maps:
                address = addresses[source] + offset
                arguments[place] = known.get(address) or _new_map(known, address, boxes)
            if stream != self.stream:
                self.stream = -1  # of all launches, once the loop has ended
                for config, *_ in self.launches:
                    config.stream = stream
                self.stream = stream
            for _, config, kernel, given in self.launches:
                status = call(config, kernel, given, None)
                if status:
                    raise cuda.refusal("a kernel", status)
        return y


def _new_map(known: _Known, address: int, boxes: tuple[Any, ...]) -> bytes:
    if len(known) >= MAPS_KEPT:
        known.clear()
    found = known[address] = cuda.tensor_map(address, *boxes)
    return found


def program_of(
    launches: list[launch.Noted | None], x: Tensor, y: Tensor, own: Operands, allocated: list[Tensor]
) -> Program | None:
    """The program of a call: its launches, None for one that cannot be repeated, its input, output, and tensors that it
    allocated, the output among them. None if they do not explain each other, or the output is of another type than the
    input, as none of ours is."""
    noted = [one for one in launches if one is not None]
    if len(noted) < len(launches) or y.dtype != x.dtype:
        return None
    between = [t for t in allocated if t.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()]
    sources = [(x.data_ptr(), x.nbytes, INPUT, 0), (y.data_ptr(), y.nbytes, OUTPUT, 0)]
    sources += [(tensor.data_ptr(), tensor.nbytes, OWN + i, 0) for i, tensor in enumerate(own.tensors)]
    sources += [(tensor.data_ptr(), tensor.nbytes, FIXED, tensor.data_ptr()) for tensor in launch.workspaces(x.device)]
    work_bytes = 0
    for tensor in between:
        sources.append((tensor.data_ptr(), tensor.nbytes, WORK, work_bytes))
        work_bytes += -(-tensor.nbytes // ALIGNED) * ALIGNED

    def source_of(address: int) -> tuple[int, int]:
        for start, size, source, offset in sources:
            if start <= address < start + size:
                return source, offset + address - start
        raise _UnexplainedError

    arguments = _Arguments()
    try:
        places = [[arguments.place(one, source_of) for one in arguments_of(launched)] for launched in noted]
        configs = [_config(launched) for launched in noted]
    except _UnexplainedError:
        return None
    program = Program(y.shape[1], x, work_bytes, arguments)
    for launched, config, own_places in zip(noted, configs, places, strict=True):
        program.add(launched.compiled, config, own_places)
    return program


class _Argument(NamedTuple):
    """One that a kernel takes."""

    size: int
    value: Any
    """An address, a number of ctypes, or `Boxes`"""


def arguments_of(noted: launch.Noted) -> list[_Argument]:
    """Of a launch, flat, as the compiled kernel takes them. Raises `_UnexplainedError` for those that are not known, or
    that do not agree with what the driver says of the kernel."""
    found: list[_Argument] = []
    types = list(noted.compiled.src.signature.values())
    for value, kind in zip((*noted.args, *[None] * (len(types) - len(noted.args))), types, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor) and kind.startswith("*"):
            found.append(_Argument(8, value.data_ptr()))
        elif type(value) is Boxes and kind.startswith("tensordesc") and noted.compiled.metadata.tensordesc_meta:
            found.append(_Argument(cuda.MAP_BYTES, value))
            found += [_Argument(4, ctypes.c_int32(size)) for size in value.shape]
            found += [_Argument(8, ctypes.c_int64(stride)) for stride in value.strides]
        elif kind in FORMATS and isinstance(value, int | float):
            found.append(_Argument(ctypes.sizeof(FORMATS[kind]), FORMATS[kind](value)))
        else:
            raise _UnexplainedError
    found += [_Argument(8, 0)] * 2  # scratch memory, of which our kernels need none
    if [argument.size for argument in found] != cuda.sizes_of_arguments(noted.compiled.function):
        raise _UnexplainedError
    return found


def _config(noted: launch.Noted) -> cuda.Config:
    metadata = noted.compiled.metadata
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.global_scratch_size:
        raise _UnexplainedError
    return cuda.config(noted.grid, 32 * metadata.num_warps, metadata.shared, metadata.launch_pdl)


def boxes_of(boxes: Boxes) -> tuple[Any, ...]:
    """All arguments of `cuda.tensor_map` but the address."""
    if boxes.base.dtype not in cuda.MAP_TYPES or boxes.padding != "zero" or boxes.round_f32_to_tf32:
        raise _UnexplainedError
    size = boxes.base.element_size()
    strides = tuple(stride * size for stride in boxes.strides[:-1])
    swizzle = cuda.SWIZZLES[boxes.layout.swizzle_byte_width]
    return cuda.MAP_TYPES[boxes.base.dtype], tuple(boxes.shape), strides, tuple(boxes.block_shape), swizzle
