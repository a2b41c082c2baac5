"""Prefill of 512 tokens on this CPU: a W4A6 model against the fp32 model of the same size.

Random weights: the figure depends on shapes only. Prints the ratio of median times (both models in turn, in one
process), the resident weights of both, and writes them into benchmarks/results under the recipe's name.

    python benchmarks/cpu_prefill.py                     the paper's ranks: 32 + 32, 8 experts
    python benchmarks/cpu_prefill.py --recipe default    a rotation and one int8 expert of rank 64 that reads codes
    python benchmarks/cpu_prefill.py --recipe default-values    the same, but it reads values
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from random_models import text_config, write_random_model
from torch import nn

from quant_experts import __version__
from quant_experts.artifacts import LowRankExpert, QuantizedGroup, RoutedExperts, Router
from quant_experts.checkpoint.tensors import describe_group, group_state
from quant_experts.config import Scheme
from quant_experts.quantizers.rtn import quantize_rtn
from quant_experts.runtime.modules import install_groups

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
RANKS = {"paper": (32, 8), "default": (64, 0), "default-values": (64, 0)}
"""Recipe -> rank of the shared and of each routed expert, number of routed experts."""


def quantize_randomly(block: nn.Module, scheme: Scheme, rank: int, experts: int, *, codes: bool) -> None:
    """Swap a block's linears for quantized ones with random factors: of the paper's shape, or, without routed
    experts, of the default recipe's. codes: what the shared expert reads."""
    for names in GROUPS:
        weights = [block.get_parameter(f"{name}.weight").detach() for name in names]
        rows, width = sum(len(w) for w in weights), weights[0].shape[1]
        group = QuantizedGroup(
            names,
            tuple(quantize_rtn(w, scheme) for w in weights),
            smooth_scale=torch.rand(width) + 0.5,
            rotation=0 if experts else 64,
            factor_bits=16 if experts else 8,
            shared_reads="codes" if codes else "values",
            shared=LowRankExpert(torch.randn(rows, rank) * 0.01, torch.randn(rank, width) * 0.01),
        )
        if experts:
            ups, downs = torch.randn(experts, rows, rank) * 0.01, torch.randn(experts, rank, width) * 0.01
            group.routed = RoutedExperts(ups, downs)
            group.router = Router(torch.rand(experts, width), torch.zeros(experts))
        install_groups(block, [describe_group(group)], scheme, group_state(group))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer, shared ones once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()] if t is not None}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--recipe", choices=RANKS, default="paper")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    scheme = Scheme.parse("W4A6")
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), text_config(arguments.hidden, arguments.intermediate, arguments.blocks))
        full = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        small = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for block in small.model.layers:
        quantize_randomly(block, scheme, *RANKS[arguments.recipe], codes=arguments.recipe == "default")
    tokens = torch.randint(0, 4096, (1, arguments.tokens))
    times: dict[str, list[float]] = {"fp32": [], "W4A6": []}
    with torch.inference_mode():
        for repeat in range(arguments.repeats + 2):
            for name, model in (("fp32", full), ("W4A6", small)):
                start = time.perf_counter()
                model(input_ids=tokens, use_cache=False, logits_to_keep=1)
                if repeat >= 2:  # the first two warm up
                    times[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times["fp32"], times["W4A6"], strict=True)]
    result = {
        "arguments": vars(arguments),
        "fp32_seconds": statistics.median(times["fp32"]),
        "w4a6_seconds": statistics.median(times["W4A6"]),
        "speedup_median": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
        "fp32_bytes": weight_bytes(full),
        "w4a6_bytes": weight_bytes(small),
        "resident_share": weight_bytes(small) / weight_bytes(full),
        "machine": platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quant_experts": __version__,
    }
    print(json.dumps(result, indent=1))
    out = Path(__file__).parent / "results" / f"cpu_prefill_{arguments.recipe}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
