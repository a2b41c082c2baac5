"""Times of one whole decoder block on a GPU, attention included: bf16 against quantized.

    python benchmarks/kernels/gpu_block.py [--models ...] [--kinds ...] [--out benchmarks/results]

writes gpu_block.json and gpu_block.md. The block is transformers' own (Qwen2-VL, random weights): norms, rotary
positions, attention, MLP. Prefill is one sequence of 2048 tokens; decode one token for each of 1, 16 or 64 sequences
with 1024 tokens in the cache. Several copies of the block run one after another in a CUDA graph, so that weights come
from memory and not from the L2 cache; a time is that of a replay over the number of copies. Memory is without what
laying out the weights takes once.

`--set MOST_BLOCKS=0` leaves out the launch that computes a whole group for one token, to compare with.
`--device cpu --tiny` checks the benchmark where there is no GPU.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from random_blocks import (
    SIZES,
    about,
    backend,
    command,
    compile_ahead,
    memory,
    options,
    random_block,
    replay_times,
    reset_peak,
    rotary,
    served_kinds,
    set_constants,
    spread,
    text_config,
    title,
    write,
)
from torch import Tensor, nn

from quant_experts.kernels.gpu import launch

SETTINGS = {  # (sequences, new tokens of each, tokens in the cache afterwards)
    "prefill 2048": (1, 2048, 0),
    "decode, batch 1": (1, 1, 1024),
    "decode, batch 16": (16, 1, 1024),
    "decode, batch 64": (64, 1, 1024),
}
TINY_SETTINGS = {"prefill 24": (1, 24, 0), "decode, batch 1": (1, 1, 16), "decode, batch 3": (3, 1, 16)}
COPIES = 2
"""Of the block: 230 MB of weights at 4 bits in the smaller model, four times the L2 cache of an H200."""
REPLAYS = 41


class FullCache:
    """A key-value cache that always holds the same number of tokens: each block's new one takes the last place."""

    def __init__(self, like: Tensor, blocks: int, heads: int, tokens: int, head: int) -> None:
        shape = (blocks, len(like), heads, tokens, head)
        self.keys, self.values = (torch.randn(shape, device=like.device).to(like.dtype) for _ in range(2))

    def update(self, key: Tensor, value: Tensor, block: int, *unused: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """key, value (B, H, 1, D) -> all of the block's, (B, H, T, D)."""
        self.keys[block, :, :, -1:] = key
        self.values[block, :, :, -1:] = value
        return self.keys[block], self.values[block]


def work(
    blocks: list[nn.Module], config: Any, setting: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """All copies, each reading the output of the one before."""
    sequences, new, cached = setting
    x = torch.randn(sequences, new, config.hidden_size, device=device).to(dtype)
    positions = rotary(config, x, max(0, cached - 1))
    head = config.hidden_size // config.num_attention_heads
    cache = FullCache(x, len(blocks), config.num_key_value_heads, cached, head) if cached else None

    def run() -> Tensor:
        y = x
        for block in blocks:
            y = block(y, position_embeddings=positions, past_key_values=cache)
        return y

    return run


def measure(
    model: str, name: str, settings: dict[str, tuple[int, int, int]], device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row for each setting."""
    config, rows = text_config(model), list[dict[str, Any]]()
    gc.collect()  # what the kind before left would be counted, or taken off when it goes
    launch.reserve(torch.empty(0, device=device).device, fp8=True)  # a GPU's, once, whatever runs there
    before = memory(device)
    blocks = [random_block(config, i, name, device, dtype) for i in range(COPIES)]
    for setting, sizes in settings.items():
        run = work(blocks, config, sizes, device, dtype)
        for _ in range(2):  # compiles kernels, lays weights out, fills workspaces
            output = run()
        finite = bool(output.isfinite().all())
        del output
        if not rows:
            weights = (memory(device) - before) / COPIES
        reset_peak(device)
        times = [t / COPIES for t in replay_times(run, REPLAYS if device.type == "cuda" else 3, device)]
        row = {
            "model": model,
            "setting": setting,
            "kind": name,
            "backend": backend(name, device),
            "microseconds": spread(times),
            "finite": finite,
            "block_bytes": weights,
            "peak_bytes": memory(device, peak=True) - before,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        del run
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table a model and setting."""
    text = "Microseconds of one decoder block: median (10% to 90% of the replays).\n"
    for model in dict.fromkeys(row["model"] for row in rows):
        text += f"\n**{model}**\n\n| setting | kind | backend | time | bf16 / this | block MB | peak MB |\n"
        text += "| --- | --- | --- | ---: | ---: | ---: | ---: |\n"
        mine = [row for row in rows if row["model"] == model]
        for row in sorted(mine, key=lambda row: list(dict.fromkeys(r["setting"] for r in mine)).index(row["setting"])):
            time = row["microseconds"]
            plain = [r for r in mine if (r["kind"], r["setting"]) == ("bf16", row["setting"])]
            ratio = f"{plain[0]['microseconds']['median'] / time['median']:.2f}" if plain else "-"
            text += f"| {row['setting']} | {title(row['kind'])} | {row['backend']} "
            text += f"| {time['median']:.0f} ({time['p10']:.0f}-{time['p90']:.0f}) | {ratio} "
            sizes = (row["block_bytes"], row["peak_bytes"])
            text += "| " + " | ".join("-" if size is None else f"{size / 1e6:.0f}" for size in sizes) + " |\n"
    return text


@torch.inference_mode()
def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=["Qwen2-VL-7B", "Qwen2-VL-72B"], choices=list(SIZES))
    arguments = parser.parse_args()
    set_constants(arguments.set)
    device, models = arguments.device, ["tiny"] if arguments.tiny else arguments.models
    settings, dtype = TINY_SETTINGS if arguments.tiny else SETTINGS, torch.bfloat16
    kinds = served_kinds(arguments.kinds, device)
    tokens = [sequences * new for sequences, new, _ in settings.values()]
    failed = compile_ahead(models, tokens, kinds) if device.type == "cuda" else []
    kinds = [kind for kind in kinds if kind not in failed]
    facts = about(command("gpu_block"), device) | {"copies": COPIES, "replays": REPLAYS}
    rows: list[dict[str, Any]] = []
    for model, kind in product(models, kinds):
        rows += measure(model, kind, settings, device, dtype)
        write(arguments.out, "gpu_block", facts, rows, table(rows), [])  # a later kind may fail
    problems = [f"{kind}: its kernels do not compile or run, see the error above." for kind in failed]
    problems += [
        f"{row['kind']} gives NaN or infinity for {row['setting']} of {row['model']}: its kernels are wrong."
        for row in rows
        if not row["finite"]
    ]
    write(arguments.out, "gpu_block", facts, rows, table(rows), problems)


if __name__ == "__main__":
    main()
