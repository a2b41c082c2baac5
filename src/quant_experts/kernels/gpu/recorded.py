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
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import count
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
"""By kind of group, shape of the input, type and device; or how often that was noted in vain."""


def run(work: Callable[[Tensor, Any], Tensor], x: Tensor, packed: Repeatable) -> Tensor:
    """work(x, packed), by its recorded launches where there are such. x (M, K)."""
    own = packed.operands
    if own is None or not x.numel() or not launch.repeatable(x.device) or cuda.driver() is None:
        return work(x, packed)
    x = x.contiguous()
    key = (own.number, x.shape, x.dtype, x.device)  # a layout knows its input channels only up to padding
    program = _programs.get(key, 0)
    if x.data_ptr() % 16:
        return work(x, packed)
    if isinstance(program, Program):
        y = program.repeat(x, own.tensors)
        return work(x, packed) if y is None else y
    if program >= ATTEMPTS:
        return work(x, packed)
    with _Allocations() as allocations, launch.noted() as launches:
        y = work(x, packed)
    made = None if allocations.others else program_of(launches, x, y, own, allocations.found)
    if len(_programs) >= KEPT:
        for old in list(_programs)[: KEPT // 2]:
            _programs.pop(old, None)
    _programs[key] = program + 1 if made is None else made
    return y


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


class _Place(NamedTuple):
    """Where an address stands."""

    word: int
    """Of 8 bytes, in the arguments of all launches"""
    source: int
    offset: int


class _Known(dict[int, bytes]):
    """Tensor maps by address, of boxes that are equal otherwise. Programs share them."""


_known: WeakValueDictionary[tuple[Any, ...], _Known] = WeakValueDictionary()
"""By all else that `cuda.tensor_map` takes."""


@dataclass(frozen=True)
class _Map:
    """Where a tensor map stands, and what it maps but for the address."""

    byte: int
    source: int
    offset: int
    boxes: tuple[Any, ...]
    """Arguments of `cuda.tensor_map`"""
    known: _Known


class _UnexplainedError(Exception):
    """A launch is given something that cannot be repeated."""


_turns: dict[torch.device, Lock] = {}
"""Threads that use one GPU take turns: a call writes its addresses into a program, and its launches follow one another.
Not those of several GPUs: a launch waits where a GPU has enough to do, perhaps for what another thread would start."""


class Program:
    """Launches that are repeated, and what of their arguments changes."""

    def __init__(self, y: Tensor, work_bytes: int, argument_bytes: int) -> None:
        self.shape, self.dtype, self.device, self.work_bytes = y.shape, y.dtype, y.device, work_bytes
        self.places: list[_Place] = []
        self.maps: list[_Map] = []
        self.launches: list[tuple[cuda.Config, Any, Any, Any]] = []
        """Configuration, a reference to it, the kernel, addresses of its arguments."""
        self.compiled: list[Any] = []
        """Kernels, which stay loaded."""
        self.stream = 0
        self.turn = _turns.setdefault(y.device, Lock())
        memory = bytearray(argument_bytes + 2 * cuda.MAP_ALIGNED)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        shift = -self.address % cuda.MAP_ALIGNED
        self.address += shift
        self.bytes = memoryview(memory)[shift : shift + -(-argument_bytes // 8) * 8]
        """Arguments of all launches"""
        self.words = self.bytes.cast("Q")

    def repeat(self, x: Tensor, own: tuple[Tensor, ...]) -> Tensor | None:
        """The output for x and a group's tensors; None where this thread has not used the GPU yet."""
        y = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        work = torch.empty(self.work_bytes, dtype=torch.uint8, device=self.device) if self.work_bytes else y
        addresses = [0, *[tensor.data_ptr() for tensor in (x, y, work, *own)]]
        stream, call = launch.current_stream(self.device), cuda.driver().cuLaunchKernelEx
        words = self.words
        with self.turn:
            for word, source, offset in self.places:
                words[word] = addresses[source] + offset
            for box in self.maps:
                address = addresses[box.source] + box.offset
                found = box.known.get(address) or _new_map(box, address)
                self.bytes[box.byte : box.byte + cuda.MAP_BYTES] = found
            if stream != self.stream:
                self.stream = -1  # of all launches, once the loop has ended
                for config, *_ in self.launches:
                    config.stream = stream
                self.stream = stream
            for i, (_, config, kernel, arguments) in enumerate(self.launches):
                status = call(config, kernel, arguments, None)
                if status:
                    if status == cuda.INVALID_CONTEXT and i == 0:
                        return None
                    raise cuda.refusal("a kernel", status)
        return y


def _new_map(box: _Map, address: int) -> bytes:
    if len(box.known) >= MAPS_KEPT:
        box.known.clear()
    found = box.known[address] = cuda.tensor_map(address, *box.boxes)
    return found


def program_of(
    launches: list[launch.Noted | None], x: Tensor, y: Tensor, own: Operands, allocated: list[Tensor]
) -> Program | None:
    """The program of a call: its launches, None for one that cannot be repeated, its input, output, and tensors that it
    allocated, the output among them. None if they do not explain each other."""
    noted = [one for one in launches if one is not None]
    if len(noted) < len(launches):
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

    try:
        layouts = [arguments_of(one) for one in noted]
        starts, end = _starts(layouts)
        program = Program(y, work_bytes, end)
        for one, layout, own_starts in zip(noted, layouts, starts, strict=True):
            for argument, start in zip(layout, own_starts, strict=True):
                _write(program, argument, start, source_of)
            config, given = _config(one), [program.address + start for start in own_starts]
            kernel = ctypes.c_void_p(one.compiled.function)
            program.launches.append((config, ctypes.byref(config), kernel, (ctypes.c_void_p * len(given))(*given)))
            program.compiled.append(one.compiled)
    except _UnexplainedError:
        return None
    return program


def _starts(layouts: list[list[_Argument]]) -> tuple[list[list[int]], int]:
    """Where the arguments of each launch begin, in bytes, and where all end."""
    end, starts = 0, []
    for layout in layouts:
        own = []
        for argument in layout:
            unit = cuda.MAP_ALIGNED if argument.size == cuda.MAP_BYTES else 8
            own.append(-(-end // unit) * unit)
            end = own[-1] + argument.size
        starts.append(own)
    return starts, end


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


def _write(program: Program, argument: _Argument, start: int, source_of: Callable[[int], tuple[int, int]]) -> None:
    """An argument that stays, or where one stands that changes."""
    value = argument.value
    if isinstance(value, Boxes):
        source, offset = source_of(value.base.data_ptr())
        boxes = boxes_of(value)
        program.maps.append(_Map(start, source, offset, boxes, _known.setdefault(boxes, _Known())))
    elif isinstance(value, int):
        source, offset = (FIXED, 0) if not value else source_of(value)
        if source == FIXED:
            program.words[start // 8] = offset
        else:
            program.places.append(_Place(start // 8, source, offset))
    else:
        program.bytes[start : start + argument.size] = bytes(value)


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
