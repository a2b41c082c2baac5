"""Compare our GPTQ with llm-compressor's on small layers: the same grid, moment, damping and order.

Runs in the environment that `benchmarks/peers/run.py --envs FOLDER` makes:

    PYTHONPATH=src FOLDER/llmcompressor/bin/python benchmarks/gptq_agreement.py

Theirs computes in float32 and ours factorises in float64, so a weight on a tie may round the other way and those after
it differ; so codes are compared, and what both leave of the output.
"""

from __future__ import annotations

import json

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from torch import Tensor

from quant_experts.config import Scheme
from quant_experts.quantizers.gptq import quantize_gptq
from quant_experts.quantizers.grids import dequantize

CASES = [(48, 64, 500, False), (48, 64, 500, True), (40, 300, 900, False), (40, 300, 900, True), (32, 96, 60, True)]
"""N, K, tokens, activation order; the last has fewer tokens than channels."""
SCHEME = Scheme.parse("W4A8")


def theirs(weight: Tensor, moment: Tensor, scale: Tensor, act_order: bool) -> Tensor:
    """Dequantized weight (N, K)."""
    arguments = QuantizationArgs(
        num_bits=4, strategy="channel", symmetric=True, actorder="weight" if act_order else None
    )
    zero = torch.zeros_like(scale)[None]
    made: Tensor
    made, _, _ = quantize_weight(weight.clone()[None], moment.float()[None], scale[None], zero, None, arguments)
    return made[0]


def main() -> None:
    for rows, columns, tokens, act_order in CASES:
        generator = torch.Generator().manual_seed(rows + columns)
        mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
        x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
        weight, moment = torch.randn(rows, columns, generator=generator), x.T @ x / tokens
        ours, _ = quantize_gptq(weight, moment.clone(), SCHEME, act_order=act_order)
        other = theirs(weight, moment, ours.scale, act_order)
        codes = (other / ours.scale).round()

        def left(made: Tensor, weight: Tensor = weight, moment: Tensor = moment) -> float:
            error = (made - weight).double()
            return float(((error @ moment) * error).sum())

        row = dict(
            shape=[rows, columns],
            tokens=tokens,
            act_order=act_order,
            equal_codes=float((codes == ours.codes).double().mean()),
            error_over_theirs=left(dequantize(ours)) / left(other),
        )
        print(json.dumps(row))


if __name__ == "__main__":
    main()
