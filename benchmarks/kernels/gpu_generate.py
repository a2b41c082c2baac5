"""Tokens a second of a whole Qwen2-VL-7B on a GPU, bf16 against quantized, random weights.

    python benchmarks/kernels/gpu_generate.py [--kinds ...] [--out benchmarks/results]

writes gpu_generate.json and gpu_generate.md. One image of 448 x 448 and a short prompt for each of 1 or 8 sequences, 64
new tokens, chosen greedily, in four ways:

- captured: a static cache and one decode step captured in a CUDA graph: embedding, decoder, head, choice of the token
  and position, so that nothing waits for the host; transformers' code as it is.
- compiled: the same with the decoder compiled by `torch.compile`, which makes few kernels of what lies between linears.
- static: `generate(cache_implementation="static")`, for which transformers compiles the decode steps on a GPU.
- plain: `generate`, kernel by kernel from Python.

Each kind and batch has a process of its own. Only the decode steps of the first two are timed apart. The quantized
models have vision tower, embedding and head of the bf16 one; nothing is calibrated: tokens mean nothing.

`--set MOST_BLOCKS=0` leaves out the launch that computes a whole group for one token, to compare with.
`--device cpu --tiny` checks the benchmark where there is no GPU.
"""

from __future__ import annotations

import gc
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
    reset_peak,
    served_kinds,
    set_constants,
    spread,
    text_config,
    title,
    write,
)
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, StaticCache

MODEL = "Qwen2-VL-7B"
DEFAULT_KINDS = ("bf16", "default", "experts", "W4A16")
BATCHES = (1, 8)
WAYS = ("compiled", "static", "plain")
NEW_TOKENS = 64
GENERATE_RUNS, GRAPH_RUNS = 2, 3
CHECKED_STEPS = 4
"""Steps that run before one is captured; their tokens must come out of the graph again."""
PATCH, MERGED = 14, 4
"""Pixels of a patch's side, patches of an image token."""
PROMPT = 24
"""Text tokens, template included."""


def random_model(tiny: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in full precision, never ending its answer by itself."""
    text = text_config("tiny" if tiny else MODEL).to_dict()
    vision = dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4)
    if tiny:
        vision = dict(depth=2, embed_dim=64, num_heads=4, mlp_ratio=2)
    last = text["vocab_size"] - 1
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "hidden_size": text["hidden_size"]},
        vision_start_token_id=last - 3,
        vision_end_token_id=last - 2,
        image_token_id=last - 1,
        video_token_id=last,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def question(model: Any, batch: int, side: int) -> dict[str, Tensor]:
    """What a processor would give for an image of `side` x `side` pixels and a prompt, `batch` times."""
    config, device = model.config, model.device
    patches = (side // PATCH) ** 2
    generator = torch.Generator(device).manual_seed(batch)
    words = torch.randint(0, 200, (batch, PROMPT), generator=generator, device=device)
    image = torch.tensor(
        [config.vision_start_token_id, *[config.image_token_id] * (patches // MERGED), config.vision_end_token_id],
        device=device,
    )
    ids = torch.cat([words[:, :4], image.expand(batch, -1), words[:, 4:]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(batch * patches, 3 * 2 * PATCH**2, generator=generator, device=device).to(
            model.dtype
        ),
        "image_grid_thw": torch.tensor([[1, side // PATCH, side // PATCH]] * batch, device=device),
    }


class Decoding:
    """Greedy decoding with a static cache. Every tensor that a step reads or writes keeps its place in memory."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], new_tokens: int, compiled: bool) -> None:
        self.model, self.inputs = model, inputs
        self.decoder = model.model.language_model
        if compiled:
            how = "inductor" if model.device.type == "cuda" else "eager"
            self.decoder = torch.compile(self.decoder, fullgraph=True, dynamic=False, backend=how)
        self.batch, self.prompt = inputs["input_ids"].shape
        self.end = self.prompt + new_tokens
        device, length = model.device, -(-self.end // 8) * 8  # attention would copy masks of another length to pad them
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.tokens = torch.zeros(self.batch, length, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.delta = torch.zeros(self.batch, 1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)

    def prefill(self) -> None:
        """Read the question and choose the first token."""
        self.cache.reset()
        output = self.model(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens[:, self.prompt] = output.logits[:, -1].argmax(dim=-1)
        self.place.fill_(self.prompt)
        self.delta.copy_(self.model.model.rope_deltas)

    def step(self) -> None:
        """Read the token at `place` and choose the next one."""
        token = self.tokens.index_select(1, self.place)
        output = self.decoder(
            inputs_embeds=self.model.model.language_model.embed_tokens(token),
            position_ids=(self.place + self.delta).expand(3, -1, -1),
            attention_mask={"full_attention": (self.places <= self.place).expand(self.batch, 1, 1, -1)},
            past_key_values=self.cache,
            use_cache=True,
        )
        self.place.add_(1)
        self.tokens.index_copy_(1, self.place, self.model.lm_head(output.last_hidden_state).argmax(dim=-1))

    def answer(self) -> Tensor:
        """(B, new tokens)"""
        return self.tokens[:, self.prompt : self.end]


def synchronize(device: torch.device) -> float:
    """The time once all work is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run_graph(
    model: Any, inputs: dict[str, Tensor], new_tokens: int, runs: int, compiled: bool = False
) -> dict[str, Any]:
    """Seconds of prefill and of all further tokens, the answer, and whether it begins as without a graph."""
    device, decoding = model.device, Decoding(model, inputs, new_tokens, compiled)
    start = synchronize(device)
    decoding.prefill()
    for _ in range(CHECKED_STEPS):
        decoding.step()
    before = decoding.answer()[:, : 1 + CHECKED_STEPS].clone()
    first = synchronize(device) - start
    replay = decoding.step
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoding.step()
        replay = graph.replay
    prefills, decodes = [], []
    for _ in range(runs):
        start = synchronize(device)
        decoding.prefill()
        middle = synchronize(device)
        for _ in range(new_tokens - 1):
            replay()
        prefills.append(middle - start)
        decodes.append(synchronize(device) - middle)
    answer = decoding.answer()
    same = torch.equal(answer[:, : 1 + CHECKED_STEPS], before)
    return {"first": first, "prefill": spread(prefills), "decode": spread(decodes), "answer": answer, "same": same}


def run_generate(model: Any, inputs: dict[str, Tensor], new_tokens: int, runs: int, **how: Any) -> dict[str, Any]:
    """Seconds of `generate`, and the answer."""
    length, times = inputs["input_ids"].shape[1], []
    options = dict(max_new_tokens=new_tokens, do_sample=False, **how)
    start = synchronize(model.device)
    model.generate(**inputs, **options)  # compiles, and loads kernels for all lengths of the cache
    first = synchronize(model.device) - start
    for _ in range(runs):
        start = synchronize(model.device)
        tokens = model.generate(**inputs, **options)
        times.append(synchronize(model.device) - start)
    return {"first": first, "seconds": spread(times), "answer": tokens[:, length:]}


def measure(model: Any, name: str, batch: int, side: int, new_tokens: int, ways: list[str]) -> dict[str, Any]:
    """One row."""
    device = model.device
    torch.compiler.reset()  # in one process what was compiled for another kind counts towards the limit of recompiling
    inputs = question(model, batch, side)
    model(**inputs, logits_to_keep=1)  # lays weights out
    row = {
        "kind": name,
        "backend": backend(name, device),
        "batch": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": new_tokens,
        "loaded_bytes": memory(device),
    }
    reset_peak(device)
    runs = GRAPH_RUNS if device.type == "cuda" else 1
    captured = run_graph(model, inputs, new_tokens, runs)
    produced, prefill, decode = batch * new_tokens, captured["prefill"]["median"], captured["decode"]["median"]
    row |= {
        "peak_bytes": memory(device, peak=True),
        "prefill_seconds": captured["prefill"],
        "decode_seconds": captured["decode"],
        "decode_tokens_per_second": (produced - batch) / decode,
        "tokens_per_second": produced / (prefill + decode),
        "repeats_its_first_steps": captured["same"],
        "distinct_tokens": len(captured["answer"].unique()),
    }
    if "compiled" in ways:
        compiled = run_graph(model, inputs, new_tokens, runs, compiled=True)
        decode = compiled["decode"]["median"]
        row |= {
            "compiled_prefill_seconds": compiled["prefill"],
            "compiled_decode_seconds": compiled["decode"],
            "compiled_decode_tokens_per_second": (produced - batch) / decode,
            "compiled_first_seconds": compiled["first"],
            "compiled_equal_tokens": equal(compiled["answer"], captured["answer"]),
        }
        row["repeats_its_first_steps"] &= compiled["same"]
    for way, how in (("static", {"cache_implementation": "static"}), ("plain", {})):
        if way in ways:
            generated = run_generate(model, inputs, new_tokens, GENERATE_RUNS if device.type == "cuda" else 1, **how)
            row |= {
                f"{way}_seconds": generated["seconds"],
                f"{way}_tokens_per_second": produced / generated["seconds"]["median"],
                f"{way}_first_seconds": generated["first"],
                f"{way}_equal_tokens": equal(generated["answer"], captured["answer"]),
            }
    return row


def equal(found: Tensor, expected: Tensor) -> float:
    """The share of equal tokens."""
    return float((found == expected).double().mean())


RATES = (
    ("captured: decode", "decode_tokens_per_second"),
    ("with prefill", "tokens_per_second"),
    ("compiled: decode", "compiled_decode_tokens_per_second"),
    ("static", "static_tokens_per_second"),
    ("plain", "plain_tokens_per_second"),
)
"""Columns of the table, tokens a second, and where a row has them."""


def table(model: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = f"**{model}**, {rows[0]['prompt_tokens']} tokens in, {rows[0]['new_tokens']} out. "
    text += "Milliseconds of prefill and of a captured decode step (10% to 90%); tokens a second, and times bf16's.\n\n"
    rates = [(head, key) for head, key in RATES if any(key in row for row in rows)]
    heads = ["batch", "kind", "backend", "prefill ms", "step ms", *(head for head, _ in rates)]
    heads += ["loaded GB", "peak GB"]
    text += f"| {' | '.join(heads)} |\n| ---: | --- | --- {'| ---: ' * (len(heads) - 3)}|\n"
    for row in sorted(rows, key=lambda row: row["batch"]):
        steps = row["new_tokens"] - 1
        plain = [r for r in rows if (r["kind"], r["batch"]) == ("bf16", row["batch"])]
        low, middle, high = (row["decode_seconds"][key] / steps * 1e3 for key in ("p10", "median", "p90"))
        cells = [str(row["batch"]), title(row["kind"]), row["backend"]]
        cells += [f"{row['prefill_seconds']['median'] * 1e3:.1f}", f"{middle:.2f} ({low:.2f}-{high:.2f})"]
        for _, key in rates:
            cells.append(f"{row[key]:.0f}" if key in row else "-")
            if key in row and plain and key in plain[0]:
                cells[-1] += f" ({row[key] / plain[0][key]:.2f})"
        cells += [f"{row[key] / 1e9:.1f}" for key in ("loaded_bytes", "peak_bytes")]
        text += f"| {' | '.join(cells)} |\n"
    return text


@torch.inference_mode()
def measure_kind(
    name: str, device: torch.device, tiny: bool, ways: list[str], constants: list[str], batch: int
) -> dict[str, Any]:
    """The row of a kind and a batch. constants: as `set_constants` takes them."""
    set_constants(constants)
    dtype = torch.float32 if tiny else torch.bfloat16
    model = random_model(tiny, device, dtype)
    layers = model.model.language_model.layers
    for i in range(len(layers)):
        layers[i] = random_block(model.config.text_config, i, name, device, dtype)
    gc.collect()  # the blocks before would be counted
    side, new_tokens = (56, 8) if tiny else (448, NEW_TOKENS)
    return measure(model, name, batch, side, new_tokens, ways)


def in_a_process(work: Any, *arguments: Any) -> Any:
    """work(*arguments) in a process of its own. A graph that is captured later in a process has longer pauses between
    its kernels, so that kinds measured one after another could not be compared (EXPERIMENTS.md)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = options(__doc__ or "", DEFAULT_KINDS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="besides captured steps")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    arguments = parser.parse_args()
    set_constants(arguments.set)
    device, tiny = arguments.device, arguments.tiny
    size = "tiny" if tiny else MODEL
    kinds, failed = served_kinds(arguments.kinds, device), []
    if device.type == "cuda":
        prompt = PROMPT + 2 + (448 // PATCH) ** 2 // MERGED
        failed = compile_ahead([size], [m for batch in arguments.batches for m in (batch, batch * prompt)], kinds)
    rows: list[dict[str, Any]] = []
    facts = about(command("gpu_generate"), device) | {
        "model": {size: SIZES[size]},
        "runs": {"captured": GRAPH_RUNS, "generate": GENERATE_RUNS},
    }
    for name in (kind for kind in kinds if kind not in failed):
        for batch in arguments.batches:
            given = (name, device, tiny, arguments.ways, arguments.set, batch)
            row = measure_kind(*given) if device.type == "cpu" else in_a_process(measure_kind, *given)
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(arguments.out, "gpu_generate", facts, rows, table(size, rows), [])  # a later kind may fail
    problems = [f"{kind}: its kernels do not compile or run, see the error above." for kind in failed]
    problems += [
        f"{row['kind']}, batch {row['batch']}: a captured step chooses other tokens than one that is not."
        for row in rows
        if not row["repeats_its_first_steps"]
    ]
    write(arguments.out, "gpu_generate", facts, rows, table(size, rows), problems)


if __name__ == "__main__":
    main()
