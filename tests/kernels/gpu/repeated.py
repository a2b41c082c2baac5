"""Recorded launches of whole groups, and the same ones as they are made without recording, on a machine without a GPU:
both must give the same kernels the same arguments, byte by byte but for where memory lies. Kernels are compiled for
Hopper and loaded nowhere; what the CUDA driver would be given is written down.

A program of its own, as it has another driver, and kernels must not be interpreted.
"""

import ctypes
import pickle
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import count
from threading import Barrier, Thread
from time import sleep
from types import SimpleNamespace
from typing import Any

import torch
import triton
from compiled import NoGpu, gpu, operands
from torch import Tensor

from quant_experts.errors import QuantExpertsError
from quant_experts.kernels.gpu import cuda as cuda_driver
from quant_experts.kernels.gpu import launch, recorded
from quant_experts.kernels.gpu.launch import Boxes
from quant_experts.kernels.gpu_tokens import hopper_project, hopper_tokens, layout, prepare_launch
from quant_experts.kernels.gpu_weight_activation import alone_launch, few_launch, hopper_launch
from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.gpu_weight_only import backend as weight_only_backend
from quant_experts.kernels.gpu_weight_only import hopper_launch as weight_only_launch

BACKENDS = (triton_backend, weight_only_backend)
MODULES = (*BACKENDS, launch, few_launch, hopper_launch, weight_only_launch, hopper_project, hopper_tokens)
MODULES += (alone_launch, layout, prepare_launch)
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(u64|u32|f32|b8)[^,)]*?(?:\[(\d+)\])?\s*[,)]")
SIZES = {"u64": 8, "u32": 4, "f32": 4, "b8": 1}
STREAM = 77
ENTER = cuda_driver.enter


class WritesDown(NoGpu):
    """Triton's driver: numbers for loaded kernels, and launches as what their kernels are given."""

    def __init__(self) -> None:
        super().__init__(90)
        numbers, properties = count(1), {"max_shared_mem": 232_448}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=lambda *_: (0, next(numbers), 0, 0, 1024)
        )
        self.launches: list[Any] = []
        self.signatures: dict[int, list[str]] = {}
        self.launcher_cls = self.launcher

    def get_current_stream(self, device: object = None) -> int:
        return STREAM

    def launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = list(source.signature.values())

        def launched(x: int, y: int, z: int, stream: int, function: int, packed: Any, *given: Any) -> None:
            found: list[Any] = []
            for value, kind in zip(given[3:], kinds, strict=True):
                if kind.startswith("tensordesc"):
                    found += [described(value), *value.shape, *value.strides]
                elif kind != "constexpr":
                    found.append(value.data_ptr() if isinstance(value, Tensor) else value)
            threads, memory = 32 * metadata.num_warps, metadata.shared
            self.launches.append([(x, y, z), threads, memory, stream, function, metadata.launch_pdl, *found, 0, 0])

        return launched


def described(value: Any) -> tuple[Any, ...]:
    """What the copy engine is told of a tensor."""
    boxes = Boxes(value.base, value.shape, value.strides, value.block_shape, value.layout)
    return value.base.data_ptr(), *recorded.boxes_of(boxes)


class Cuda:
    """The CUDA driver's library: launches written down in the same form, and sizes of arguments out of the PTX."""

    def __init__(self, triton_s: WritesDown) -> None:
        self.triton_s = triton_s
        self.maps: dict[bytes, tuple[Any, ...]] = {}
        self.status = 0
        self.entered: list[torch.device] = []

    def parameters(self, function: int) -> list[tuple[str, int]]:
        """Type and size of each argument of a kernel."""
        compiled = next(one.compiled for one in launch._loaded.values() if one.function == function)
        entry = compiled.asm["ptx"].partition(".entry")[2].partition("{")[0]
        return [(kind, SIZES[kind] * int(times or 1)) for kind, times in PARAMETER.findall(entry)]

    def parameter(self, function: Any, index: Any, _: Any, size: Any) -> int:
        parameters = self.parameters(function.value)
        if index.value >= len(parameters):
            return 1
        size._obj.value = parameters[index.value][1]
        return 0

    def encode(
        self, to: Any, kind: int, rank: int, address: Any, shape: Any, strides: Any, box: Any, steps: Any, *rest: int
    ) -> int:
        assert rank in (1, 2) and list(steps) == [1] * rank and to.value % 64 == 0
        assert rest[0] == 0 and rest[2:] == (2, 0)
        made = (address.value, kind, tuple(shape)[::-1], tuple(strides)[: rank - 1][::-1], tuple(box)[::-1], rest[1])
        number = len(self.maps).to_bytes(cuda_driver.MAP_BYTES, "little")
        self.maps[number] = made
        ctypes.memmove(to.value, number, cuda_driver.MAP_BYTES)
        return 0

    def name_error(self, status: int, name: Any) -> int:
        if status != 719:
            return 1
        name._obj.value = b"CUDA_ERROR_LAUNCH_FAILED"
        return 0

    def launch(self, config: Any, function: Any, given: Any, _: None) -> int:
        config = config._obj
        found: list[Any] = []
        for address, (kind, size) in zip(given, self.parameters(function.value), strict=True):
            assert kind != "b8" or address % cuda_driver.MAP_ALIGNED == 0
            read = ctypes.string_at(address, size)
            if kind == "b8":
                found.append(self.maps[read])
            elif kind == "f32":
                found.append(ctypes.c_float.from_buffer_copy(read).value)
            else:
                found.append(int.from_bytes(read, "little", signed=kind == "u32"))
        overlapped = bool(config.count) and (config.attributes[0].id, config.attributes[0].value[0]) == (6, 1)
        assert tuple(config.block)[1:] == (1, 1)
        shape = (tuple(config.grid), config.block[0], config.shared)
        self.triton_s.launches.append([*shape, config.stream, function.value, overlapped, *found])
        return self.status


def without_addresses(launches: list[Any], known: dict[int, str]) -> list[Any]:
    """Launches with names for addresses: of known tensors, else in the order in which they come, with those that lie in
    what was allocated told apart as often as they differ."""
    names = dict(known)
    result = []
    for one in launches:
        named = []
        for value in one:
            address = value[0] if isinstance(value, tuple) and len(value) == 6 else value
            if isinstance(address, int) and address > 1 << 32:
                address = names.setdefault(address, f"new {len(names)}")
            named.append((address, *value[1:]) if isinstance(value, tuple) and len(value) == 6 else address)
        result.append(named)
    return result


def addresses(launches: list[Any]) -> set[Any]:
    """Of tensors and in tensor maps."""
    return {value[0] if isinstance(value, tuple) else value for one in launches for value in one}


def names(x: Tensor, packed: Any) -> dict[int, str]:
    """Of tensors that a call is given."""
    own = recorded.operands(packed)
    assert own is not None
    return {x.data_ptr(): "x"} | {tensor.data_ptr(): f"own {i}" for i, tensor in enumerate(own.tensors)}


SORTED, UNSORTED = 6, 4
"""Launches of many tokens of routed experts."""
CASES: tuple[tuple[Any, int, Any, int, int, tuple[int, ...], tuple[str, ...]], ...] = (
    (triton_backend, 8, "int", 3584, 0, (1, 4, 100, 600), ("none", "experts", "codes")),
    (triton_backend, 8, "fp8", 256, 0, (100,), ("experts",)),
    (weight_only_backend, 16, "int", 512, -8, (1, 100, 600), ("codes",)),
    (weight_only_backend, 16, "int", 3584, 0, (40, 600), ("experts",)),  # codes of 3 bits, of sizes that `compiled` has
)
"""Backend, bits and format of activations, input channels, a code, tokens, kinds."""
OUTPUTS = 512


def groups() -> Iterator[tuple[Any, Any, Any, int, int, str]]:
    """Backends, two groups of one kind, tokens and input channels."""
    for backend, bits, form, k, code, tokens, kinds in CASES:
        for kind in kinds:
            of = (kind, bits, form, OUTPUTS, k, code)
            first, second = (backend.pack(*operands(*of), torch.bfloat16) for _ in range(2))
            for m in tokens:
                yield backend, first, second, m, k, f"{backend.__name__} {form} {kind} {k} channels, {m} tokens"


def check(driver: WritesDown, cuda: Cuda) -> None:
    """The second call and those after it are repeated, and their launches are those of a call that is not."""
    for backend, first, second, m, k, name in groups():
        x, other = (torch.ones(m, k, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(2):  # the first one makes workspaces
            backend.apply(x, first)
        made = program(x, first)
        if backend is weight_only_backend and first.linear.bits == 3 and m >= 512:  # PyTorch multiplies there
            assert isinstance(made, int), name
            continue
        assert isinstance(made, recorded.Program), name
        copies = deepcopy(first), pickle.loads(pickle.dumps(first))
        assert not any("operands" in vars(copied) for copied in copies), "their number is of one process"
        for given, packed in ((x, first), (other, second), *((x, copied) for copied in copies), (other, first)):
            compare(driver, backend, given, packed, name)
        if backend is triton_backend and m > prepare_launch.FEW_TOKENS and first.group.experts:
            driver.launches.clear()
            backend.apply(x, first)
            assert len(driver.launches) == UNSORTED, name
        kinds = len(recorded._programs)
        compare(driver, backend, x.view(1, m, 1, k), first, name)
        assert len(recorded._programs) == kinds, "tokens in other dimensions are the same call"
        apart = torch.ones(m, 2 * k, dtype=torch.bfloat16)
        driver.launches.clear()
        assert backend.apply(apart[:, :k], first).shape == (m, OUTPUTS)
        assert driver.launches and (m == 1 or not addresses(driver.launches) & {apart.data_ptr()}), name
    assert len(cuda.maps) > 10
    weights = [box for kept in recorded._programs.values() for box in getattr(kept, "maps", ()) if box.source > 3]
    assert len({id(box.known) for box in weights}) < len(weights), "programs share tensor maps of weights"


def program(x: Tensor, packed: Any) -> Any:
    """What is kept for such a call."""
    return recorded._programs.get((packed.operands.number, x.numel(), x.shape[-1], x.dtype, x.device))


def compare(driver: WritesDown, backend: Any, x: Tensor, packed: Any, name: str) -> None:
    """A repeated call with one that is not, and with what that allocates."""
    driver.launches.clear()
    y = backend.apply(x, packed)
    found = without_addresses(driver.launches, names(x, packed) | {y.data_ptr(): "y"})
    driver.launches.clear()
    with recorded._Allocations() as allocations:  # keeps what is allocated, so that addresses differ
        expected_y = backend._apply(x.view(-1, x.shape[-1]), packed)
    expected = without_addresses(driver.launches, names(x, packed) | {expected_y.data_ptr(): "y"})
    assert found == expected and found, name
    assert y.shape == (*x.shape[:-1], expected_y.shape[1]) and y.dtype == expected_y.dtype
    kept, end, starts = program(x, packed), 0, list[int]()
    for tensor in allocations.found:
        if tensor.data_ptr() != expected_y.data_ptr():
            starts.append(end)
            end += -(-tensor.nbytes // recorded.ALIGNED) * recorded.ALIGNED
    assert kept.work_bytes == end, name
    used = {place.offset for place in (*kept.pointers, *kept.maps) if place.source == recorded.WORK}
    assert used <= set(starts), f"{name}: nothing of ours begins inside of what was allocated"


def check_sorted(driver: WritesDown) -> None:
    """Tokens that are sorted, as where outputs are many."""
    idle, prepare_launch.MOST_IDLE = prepare_launch.MOST_IDLE, 0
    first, second = (
        triton_backend.pack(*operands("experts", 8, "int", OUTPUTS, 640, 0), torch.bfloat16) for _ in range(2)
    )
    x, other = (torch.ones(600, 640, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(2):
        triton_backend.apply(x, first)
    for given, packed in ((x, first), (other, second), (other, first)):
        compare(driver, triton_backend, given, packed, "sorted tokens")
    driver.launches.clear()
    triton_backend.apply(x, first)
    assert len(driver.launches) == SORTED
    prepare_launch.MOST_IDLE = idle


def check_channels(driver: WritesDown) -> None:
    """Layouts that differ in input channels alone, which padding hides, are told apart."""
    for backend, bits in ((triton_backend, 8), (weight_only_backend, 16)):
        for m in (1, 4, 100):
            for k in (256, 200, 204):
                group, linears = operands("none", bits, "int", OUTPUTS, k, -8)
                linears = [replace(one, scale=one.scale[:, :1].contiguous(), group_size=None) for one in linears]
                packed = backend.pack(replace(group, smooth_scale=None), linears, torch.bfloat16)
                x = torch.ones(m, k, dtype=torch.bfloat16)
                for _ in range(3):
                    backend.apply(x, packed)
                compare(driver, backend, x, packed, f"{backend.__name__}, {m} tokens, {k} channels")


def check_refusals(driver: WritesDown, cuda: Cuda) -> None:
    """What cannot be repeated runs as it is written, and an error of the driver is told."""
    packed = triton_backend.pack(*operands("none", 8, "int", OUTPUTS, 256, 0), torch.bfloat16)
    memory = torch.ones(8 * 256 + 8, dtype=torch.bfloat16)
    aligned, apart = memory[:-8].view(8, 256), memory[1:-7].view(8, 256)
    for _ in range(2):
        triton_backend.apply(aligned, packed)
    cuda.status = 1
    triton_backend.apply(apart, packed)  # not by the program
    for status, what in ((719, "a kernel: CUDA_ERROR_LAUNCH_FAILED (719)"), (9999, "an unknown error (9999)")):
        cuda.status = status
        try:
            triton_backend.apply(aligned, packed)
        except QuantExpertsError as error:
            assert what in str(error)
        else:
            raise AssertionError(f"{status} was not told")
    cuda.status = 0
    calls: list[int] = []

    def other(x: Tensor, packed: Any) -> Tensor:
        """Does what no launch explains."""
        calls.append(len(x))
        return triton_backend._apply(x + 1, packed)

    recorded._programs.clear()
    cuda.entered.clear()
    for _ in range(5):
        recorded.run(other, aligned, packed)
    assert len(calls) == len(cuda.entered) == 5  # a context for whoever launches
    own_entered: list[bool] = []

    def look() -> None:
        ENTER(aligned.device)
        own_entered.append(aligned.device in cuda_driver._entered.devices)

    thread = Thread(target=look)
    thread.start()
    thread.join()
    assert own_entered == [True] and aligned.device not in cuda_driver._entered.devices, "each thread for itself"
    recorded._programs.clear()
    for _ in range(3):  # an output of another type than the input's
        y = recorded.run(lambda x, packed: torch.empty(len(x), 5, dtype=torch.float64), aligned, packed)
        assert y.dtype == torch.float64 and y.shape == (8, 5)
    for mode in (torch.no_grad, torch.inference_mode):  # which shows copies as the views that they might be
        for work, computes in (
            (lambda: aligned[:, :64].view(torch.int16).T, False), (lambda: aligned.float(), True),
            (lambda: aligned.T.contiguous(), True), (lambda: aligned.T.reshape(-1), True),
        ):  # fmt: skip
            with mode(), recorded._Allocations() as seen:
                work()
            assert seen.others == computes
    scale = packed.linear.scale
    for unfit in (scale[1:], scale[::2], packed.linear.weight.view(-1)[: scale.numel()], [scale]):
        assert recorded.operands(replace(packed, linear=replace(packed.linear, bias=unfit))) is None


def check_drivers(cuda: Cuda) -> None:
    """With a driver that does not say what kernels take, one that says otherwise, or none, every call runs as it is
    written; so does one without tokens."""
    packed = triton_backend.pack(*operands("none", 8, "int", OUTPUTS, 256, 0), torch.bfloat16)
    aligned = torch.ones(8, 256, dtype=torch.bfloat16)
    assert triton_backend.apply(aligned[:0], packed).shape == (0, OUTPUTS)
    library = cuda_driver.driver()
    for parameter in (None, lambda *_: 1):  # a driver that does not tell, and one that tells otherwise
        recorded._programs.clear()
        del library.cuFuncGetParamInfo
        if parameter is not None:
            library.cuFuncGetParamInfo = parameter
        else:
            assert cuda_driver.sizes_of_arguments(1) is None
        for _ in range(recorded.ATTEMPTS + 2):
            assert triton_backend.apply(aligned, packed).shape == (8, OUTPUTS)
        assert program(aligned, packed) == recorded.ATTEMPTS
        library.cuFuncGetParamInfo = cuda.parameter
    cuda_driver.driver, kept_driver = lambda: None, cuda_driver.driver  # type: ignore[assignment]
    recorded._programs.clear()
    assert triton_backend.apply(aligned, packed).shape == (8, OUTPUTS) and program(aligned, packed) is None
    cuda_driver.driver = kept_driver


def check_threads(driver: WritesDown) -> None:
    """Threads that call one group at once launch whole calls, each with its own input."""
    packed = triton_backend.pack(*operands("none", 8, "int", OUTPUTS, 256, 0), torch.bfloat16)
    inputs = [torch.ones(8, 256, dtype=torch.bfloat16) for _ in range(4)]
    known = names(inputs[0], packed) | {x.data_ptr(): "x" for x in inputs}
    recorded._programs.clear()
    for x in inputs:
        triton_backend.apply(x, packed)
    assert isinstance(program(inputs[0], packed), recorded.Program)
    driver.launches.clear()
    triton_backend.apply(inputs[0], packed)
    expected = without_addresses(driver.launches, known)
    driver.launches.clear()
    begun, launch_now = Barrier(len(inputs)), cuda_driver.driver().cuLaunchKernelEx

    def slowly(*given: Any) -> int:
        sleep(0.002)  # others go on meanwhile
        status: int = launch_now(*given)
        return status

    def call(x: Tensor) -> None:
        begun.wait()
        for _ in range(5):
            triton_backend.apply(x, packed)

    cuda_driver.driver().cuLaunchKernelEx = slowly
    threads = [Thread(target=call, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuda_driver.driver().cuLaunchKernelEx = launch_now
    assert len(driver.launches) == 5 * len(inputs) * len(expected) > len(expected) > 1
    for first in range(0, len(driver.launches), len(expected)):
        assert without_addresses(driver.launches[first : first + len(expected)], known) == expected


def check_limits() -> None:
    """Programs that are kept have an end, and the last one is kept."""
    packed = triton_backend.pack(*operands("none", 8, "int", OUTPUTS, 256, 0), torch.bfloat16)
    recorded.KEPT = 10
    recorded._programs.clear()
    for m in range(20, 50):
        triton_backend.apply(torch.ones(m, 256, dtype=torch.bfloat16), packed)
        assert len(recorded._programs) <= 10
        assert any(key[1:3] == (m * 256, 256) for key in recorded._programs)  # type: ignore[index]


def pretend() -> tuple[WritesDown, Cuda]:
    """From here on there is a Hopper GPU, whose tensors lie in ordinary memory."""
    driver = WritesDown()
    triton.runtime.driver.set_active(driver)
    cuda, kept = Cuda(driver), dict[Any, Tensor]()

    def zeros(name: str, size: int, device: torch.device) -> Tensor:
        """Made once, as on a GPU."""
        if name not in kept or kept[name].numel() < size:
            kept[name] = torch.zeros(size, dtype=torch.int32)
        return kept[name]

    replaced = {name: (getattr(launch, name), value) for name, value in (gpu(90) | dict(zeros=zeros)).items()}
    for module in MODULES:
        for name, (before, value) in replaced.items():
            if getattr(module, name, None) is before:
                setattr(module, name, value)
    library = SimpleNamespace(
        cuFuncGetParamInfo=cuda.parameter, cuTensorMapEncodeTiled=cuda.encode, cuLaunchKernelEx=cuda.launch,
        cuGetErrorName=cuda.name_error,
    )  # fmt: skip
    cuda_driver.driver = lambda: library  # type: ignore[assignment]
    cuda_driver.enter = cuda.entered.append  # type: ignore[assignment]
    launch.repeatable = lambda device: True
    launch.workspaces = lambda device: list(kept.values())
    return driver, cuda


def main() -> None:
    driver, cuda = pretend()
    with torch.inference_mode():
        check(driver, cuda)
    check_sorted(driver)
    check_channels(driver)
    check_refusals(driver, cuda)
    check_drivers(cuda)
    check_threads(driver)
    check_limits()


if __name__ == "__main__":
    main()
