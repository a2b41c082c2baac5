"""What a decoder takes that runs block by block from Python, as in plain `generate`: bf16 against quantized.

    python benchmarks/kernels/gpu_eager.py [--kinds ...] [--out benchmarks/results]

writes gpu_eager.json and gpu_eager.md. Blocks of Qwen2-VL-7B (transformers' own, random weights), one after another
without a CUDA graph, and a wait for the GPU at the end. Quantized kinds are timed with recorded launches repeated, as
they run, and with each launch decided on anew ("launched"). All kinds take turns, and ratios are taken within a round:
what is timed is mostly the processor beside the GPU, which others may use too.

`--device cpu --tiny` checks the benchmark where there is no GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpu_block import work
from random_blocks import (
    about,
    backend,
    command,
    compile_ahead,
    options,
    random_block,
    served_kinds,
    set_constants,
    spread,
    text_config,
    title,
    write,
)

from quant_experts.kernels.gpu import launch

MODEL = "Qwen2-VL-7B"
DEFAULT_KINDS = ("bf16", "no-experts", "default", "experts", "W4A16")
SETTINGS = {"decode, batch 1": (1, 1, 1024), "prefill 282": (1, 282, 0), "prefill 1024": (1, 1024, 0)}
"""Sequences, new tokens of each, tokens in the cache afterwards."""
TINY_SETTINGS = {"decode, batch 1": (1, 1, 16), "prefill 24": (1, 24, 0)}
BLOCKS, ROUNDS, WARMING = 8, 31, 4


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a call, until the GPU has done it."""
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def launched(run: Callable[[], object]) -> Callable[[], None]:
    """As `run`, with no launch repeated."""

    def anew() -> None:
        repeatable, launch.repeatable = launch.repeatable, lambda device: False
        try:
            run()
        finally:
            launch.repeatable = repeatable

    return anew


def measure(
    setting: str, runs: Mapping[str, Callable[[], object]], count: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each kind, and way to launch. runs: of `count` blocks, by kind."""
    ways: list[tuple[str, str, Callable[[], object]]] = [(kind, "repeated", run) for kind, run in runs.items()]
    if device.type == "cuda":
        ways += [(kind, "launched", launched(run)) for kind, run in runs.items() if kind != "bf16"]
    for _, _, run in ways * WARMING:
        run()
    rounds = [[milliseconds(run, device) / count for _, _, run in ways] for _ in range(ROUNDS)]
    rows = []
    for i, (kind, way, _) in enumerate(ways):
        row: dict[str, Any] = dict(setting=setting, kind=kind, launches=way, backend=backend(kind, device))
        row["milliseconds"] = spread([times[i] for times in rounds])
        if ways[0][0] == "bf16":
            row["bf16_over_this"] = spread([times[0] / times[i] for times in rounds])
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = "Milliseconds of a block: median (10% to 90% of the rounds).\n\n"
    text += "| setting | kind | launches | time | bf16 / this |\n| --- | --- | --- | ---: | ---: |\n"
    for row in rows:
        cells = [row["milliseconds"], row.get("bf16_over_this")]
        shown = [f"{c['median']:.2f} ({c['p10']:.2f}-{c['p90']:.2f})" if c else "-" for c in cells]
        way = "-" if row["kind"] == "bf16" else row["launches"]
        text += f"| {row['setting']} | {title(row['kind'])} | {way} | " + " | ".join(shown) + " |\n"
    return text


@torch.inference_mode()
def main() -> None:
    arguments = options(__doc__ or "", DEFAULT_KINDS).parse_args()
    set_constants(arguments.set)
    device, dtype, config = arguments.device, torch.bfloat16, text_config("tiny" if arguments.tiny else MODEL)
    settings = TINY_SETTINGS if arguments.tiny else SETTINGS
    kinds = served_kinds(arguments.kinds, device)
    failed = compile_ahead([MODEL], [m * n for m, n, _ in settings.values()], kinds) if device.type == "cuda" else []
    kinds = [kind for kind in kinds if kind not in failed]
    count = min(BLOCKS, config.num_hidden_layers)
    blocks = {kind: [random_block(config, i, kind, device, dtype) for i in range(count)] for kind in kinds}
    facts = about(command("gpu_eager"), device) | {"blocks": count, "rounds": ROUNDS}
    rows: list[dict[str, Any]] = []
    for setting, sizes in settings.items():
        runs = {kind: work(blocks[kind], config, sizes, device, dtype) for kind in kinds}
        rows += measure(setting, runs, count, device)
        write(arguments.out, "gpu_eager", facts, rows, table(rows), [])  # a later setting may fail
    problems = [f"{kind}: its kernels do not compile or run, see the error above." for kind in failed]
    write(arguments.out, "gpu_eager", facts, rows, table(rows), problems)


if __name__ == "__main__":
    main()
