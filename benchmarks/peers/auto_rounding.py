"""AutoRound on the whole model, of which it quantizes the language model's blocks. Runs in its own environment; see
`peer_main`."""

from __future__ import annotations

from typing import Any

from auto_round import AutoRound
from exchange import LANGUAGE_MODEL, Grid, peer_main
from torch import Tensor, nn
from transformers import AutoTokenizer


def rounded(model: Any, samples: list[dict[str, Tensor]], **training: Any) -> tuple[dict[str, Tensor], Grid]:
    """Its preset W4A16, symmetric in groups of 128, and steps of 8 samples as is its default.

    The samples differ in length, so a step takes them one by one and adds their gradients up. In float32: bfloat16, its
    default, is slower than that on a CPU.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    rounding = AutoRound(
        model,
        tokenizer,
        processor=tokenizer,  # asked for, and not used: samples are ready
        scheme="W4A16",
        dataset=samples,
        nsamples=len(samples),
        batch_size=1,
        gradient_accumulate_steps=8,
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        **training,
    )
    quantized, layers = rounding.quantize()
    if quantized is not model:
        raise ValueError("AutoRound returned another model than it was given")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(LANGUAGE_MODEL)}
    chosen = {(layers[n]["bits"], layers[n]["group_size"], layers[n]["sym"], layers[n]["act_bits"]) for n in linears}
    (grid,) = chosen
    return {name: linear.weight.data for name, linear in linears.items()}, Grid(*grid)


def default(model: Any, samples: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Grid]:
    """200 steps for each block."""
    return rounded(model, samples, iters=200)


def light(model: Any, samples: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Grid]:
    """Its recipe "light": 50 steps for each block, at a larger rate."""
    return rounded(model, samples, iters=50, lr=5e-3)


if __name__ == "__main__":
    peer_main({"default": default, "light": light})
