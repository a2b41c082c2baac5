"""Decoder blocks of Qwen2-VL with random weights, in bf16 or quantized, and how work on them is timed.

A quantized block is made on its device from random packed codes, through the modules that checkpoints are loaded into:
nothing is calibrated, and no weight is ever there in full precision.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer, Qwen2VLRotaryEmbedding

from quant_experts.checkpoint.schema import GroupSpec
from quant_experts.config import RECIPES, Scheme
from quant_experts.runtime.modules import InputGroup, QuantizedLinear, swap_linears

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2-VL-7B": dict(
        hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, num_hidden_layers=28
    ),
    "Qwen2-VL-72B": dict(
        hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=29568, num_hidden_layers=80
    ),
    "tiny": dict(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192, num_hidden_layers=2
    ),
}
WEIGHT_STD, CORRECTION_STD = 0.02, 0.01
"""Of quantized weights, as Qwen2-VL initialises them, and of up factors."""


@dataclass(frozen=True)
class Kind:
    """How a block's linears are quantized."""

    title: str
    scheme: Scheme
    spec: dict[str, Any]
    """Fields of `GroupSpec`."""


_RECIPE = RECIPES["quant-experts"]
_DEFAULT = dict(
    smooth=True,
    rotation=_RECIPE.rotation,
    shared_rank=_RECIPE.shared_rank,
    factor_bits=_RECIPE.factor_bits,
    shared_reads=_RECIPE.shared_reads,
)
_STATIC = f"rotation {_RECIPE.rotation}, static expert of rank {_RECIPE.shared_rank}"
KINDS = {
    "bf16": None,
    "no-experts": Kind("W4A8, no experts", Scheme.parse("W4A8"), dict(smooth=True)),
    "default": Kind(f"W4A8, default recipe ({_STATIC})", Scheme.parse("W4A8"), _DEFAULT),
    "experts": Kind(
        "W4A8, 8 routed experts and a shared one, rank 32 + 32",
        Scheme.parse("W4A8"),
        dict(smooth=True, shared_rank=32, routed_rank=32, experts=8),
    ),
    "fp8-experts": Kind(
        "W4Afp8, 8 routed experts and a shared one, rank 32 + 32",
        Scheme.parse("W4Afp8"),
        dict(smooth=True, shared_rank=32, routed_rank=32, experts=8),
    ),
    "W4A16": Kind(f"W4A16, default recipe ({_STATIC})", Scheme.parse("W4A16"), _DEFAULT),
    "W3A16": Kind(f"W3A16, default recipe ({_STATIC})", Scheme.parse("W3A16"), _DEFAULT),
}


def backend(name: str, device: torch.device) -> str:
    """What computes the linears of a kind."""
    kind = KINDS[name]
    if kind is None:
        return "PyTorch"
    return InputGroup(GroupSpec(linears=("any",)), kind.scheme, 128).select_backend(device).name


def title(name: str) -> str:
    """A kind in words."""
    kind = KINDS[name]
    return name if kind is None else kind.title


def served_kinds(names: Iterable[str], device: torch.device) -> list[str]:
    """Those of the kinds that another backend than the reference serves; says which it leaves out. Ends the program
    where there is no such device."""
    if device.type == "cuda":
        import gpu_linear

        gpu_linear.require_gpu()
    served = []
    for name in names:
        if backend(name, device) == "reference":
            print(f"{name}: only the reference backend computes this on {device.type}, left out", flush=True)
        else:
            served.append(name)
    return served


def text_config(model: str) -> Any:
    """The decoder of a size, a `Qwen2VLTextConfig`."""
    sizes = SIZES[model]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    sections = [head // 8, head * 3 // 16, head * 3 // 16]
    fields: dict[str, Any] = dict(
        vocab_size=256 if model == "tiny" else 152064,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections),
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return Qwen2VLTextConfig(**sizes, **fields)


def random_block(config: Any, index: int, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The decoder block of that index with random weights; name is one of KINDS."""
    with torch.device("meta"):
        block: nn.Module = Qwen2VLDecoderLayer(config, index).to(dtype).eval().requires_grad_(False)
    generator, kind = torch.Generator(device).manual_seed(index), KINDS[name]
    if kind is not None:
        for linears in GROUPS:
            with device:
                modules = swap_linears(block, GroupSpec(linears=linears, **kind.spec), kind.scheme)
            for linear, module in modules.items():
                _fill(module, generator)
                module.finalize(linear)
    for owner in block.modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is not None:
                value = torch.ones(parameter.shape, dtype=dtype, device=device)
                if "norm" not in type(owner).__name__.lower():
                    value.normal_(0, WEIGHT_STD, generator=generator)
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
    return block


def _fill(module: QuantizedLinear, generator: torch.Generator) -> None:
    """Random values in every tensor of a linear, and of its group if it is the first; outputs like bf16's in size."""
    bits, columns = module.scheme.weight_bits, module.in_features
    byte = (255**2 / 12) ** 0.5
    for key, value in module.named_buffers():
        name = key.rpartition(".")[2]
        if name == "weight_shape":
            value.copy_(torch.tensor([module.out_features, columns]))
        elif value.dtype == torch.int32:
            value.random_(-(2**31), 2**31, generator=generator)
        elif value.dtype == torch.int8:
            value.random_(-127, 128, generator=generator)
        elif name == "weight_scale":
            value.uniform_(0.5, 1.5, generator=generator).mul_(WEIGHT_STD * 12**0.5 / 2**bits)
        elif name == "smooth_scale":
            value.uniform_(0.5, 2, generator=generator)
        elif name == "router_weight":
            value.uniform_(0, 1, generator=generator)
        elif name.endswith("_scale"):
            value.fill_(CORRECTION_STD / byte if "up" in name else columns**-0.5 / byte)
        elif name != "router_bias":
            value.normal_(generator=generator).mul_(CORRECTION_STD if "up" in name else columns**-0.5)


def rotary(config: Any, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Position embeddings of x (B, T, K), text whose first token has the position `start`."""
    positions = torch.arange(start, start + x.shape[1], device=x.device).expand(3, len(x), -1)
    embedding: tuple[Tensor, Tensor] = Qwen2VLRotaryEmbedding(config).to(x.device)(x, positions)
    return embedding


def replay_times(work: Callable[[], object], replays: int, device: torch.device) -> list[float]:
    """Microseconds of single runs of `work`: replays of a CUDA graph of it, or plain calls on a CPU."""
    if device.type != "cuda":
        times = []
        for _ in range(replays):
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e6)
        return times
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start_event, end_event in events:
        start_event.record()
        graph.replay()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) * 1000 for start_event, end_event in events]


def spread(times: list[float]) -> dict[str, float]:
    """Median and the values that a tenth of the times lie below and above."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {"median": median(ordered), "p10": ordered[round(last * 0.1)], "p90": ordered[round(last * 0.9)]}


def memory(device: torch.device, peak: bool = False) -> int:
    """Bytes of tensors on the GPU now, or at most since the last reset; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def reset_peak(device: torch.device) -> None:
    """`memory(..., peak=True)` counts from here."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def compile_ahead(models: Iterable[str], tokens: Iterable[int], kinds: Iterable[str]) -> list[str]:
    """Let processes side by side fill the kernel compiler's cache, one for each number of tokens and kind. -> the kinds
    of those that failed."""
    started = [
        (kind, subprocess.Popen([sys.executable, __file__, kind, str(m), *models]))
        for m in sorted(set(tokens), reverse=True)
        for kind in kinds
        if KINDS[kind] is not None
    ]
    failed = [kind for kind, process in started if process.wait()]
    return list(dict.fromkeys(failed))


def about(command: str, device: torch.device) -> dict[str, Any]:
    """What a result needs to be repeated."""
    if device.type != "cuda":
        return {"command": command, "chip": "CPU, for checking only"}
    import gpu_linear

    facts = gpu_linear.about(command)
    facts["versions"]["transformers"] = transformers.__version__
    return facts


def write(
    folder: Path, name: str, facts: dict[str, Any], rows: list[dict[str, Any]], text: str, problems: list[str]
) -> None:
    """`name`.json and `name`.md. Ends the program with an error if there were problems, once all is written."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = facts | {"problems": problems}
    (folder / f"{name}.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(text)
    if problems:
        sys.exit("\n".join(problems))


def options(description: str, kinds: Iterable[str] = tuple(KINDS)) -> argparse.ArgumentParser:
    """The options that the benchmarks on blocks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(kinds), choices=list(KINDS))
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="a small model, to check the benchmark itself")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="constants of `alone_launch`: MOST_BLOCKS=0 leaves it out",
    )
    return parser


def set_constants(assignments: Iterable[str]) -> None:
    """Other constants than those chosen, of which groups take one launch for one token.

    Raises `SystemExit` for a name that is none.
    """
    if not assignments:
        return
    from quant_experts.kernels.gpu_weight_activation import alone_launch

    for name, _, value in (assignment.partition("=") for assignment in assignments):
        if not isinstance(getattr(alone_launch, name, None), int) or not value.isdigit():
            sys.exit(f"--set {name}={value}: alone_launch has no such constant, or this is no number.")
        setattr(alone_launch, name, int(value))


def command(name: str) -> str:
    """The call of a benchmark, as it was made."""
    return shlex.join(["python", f"benchmarks/kernels/{name}.py", *sys.argv[1:]])


def _compile(kind: str, tokens: int, models: list[str]) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    for model in models:
        config = text_config(model)
        x = torch.randn(1, tokens, config.hidden_size, device=device).to(dtype)
        random_block(config, 0, kind, device, dtype)(x, position_embeddings=rotary(config, x, 0))
    torch.cuda.synchronize()


if __name__ == "__main__":
    with torch.inference_mode():
        _compile(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
