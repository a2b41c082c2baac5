"""Compare the low-rank fit with a public implementation of the same optimum, EoRA's (its whitening is QERA exact's).

    pip install --no-deps --target FOLDER gptqmodel==7.7.0
    python benchmarks/eora_agreement.py FOLDER

Only one file of the package is used; what that file imports is replaced, so that none of its requirements is needed.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import types
from typing import Any

import torch
from torch import Tensor

from quant_experts.experts.low_rank import fit_low_rank

STAND_INS: dict[str, dict[str, Any]] = {
    "gptqmodel": {},
    "gptqmodel.eora": {},
    "gptqmodel.utils": {},
    "gptqmodel.utils.logger": {"setup_logger": logging.getLogger},
    "gptqmodel.utils.rocm": {"IS_ROCM": False},
    "gptqmodel.utils.torch": {"TORCH_GTE_210": True},
}
SHAPES = ((96, 64, 500), (40, 130, 900), (64, 96, 50))
"""N, K, tokens; the last has fewer tokens than channels."""
RANK = 8


def main(folder: str) -> None:
    for name, members in STAND_INS.items():
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [f"{folder}/{name.replace('.', '/')}"]
        vars(module).update(members)
    theirs = importlib.import_module("gptqmodel.eora.eora").eora_compute_lora
    for rows, columns, tokens in SHAPES:
        generator = torch.Generator().manual_seed(rows)
        spread = torch.randn(columns, generator=generator).exp()
        x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * spread
        error, moment = torch.randn(rows, columns, generator=generator), x.T @ x / tokens
        down, up = theirs(error.clone(), "x", moment, RANK, torch.float32, torch.device("cpu"))
        expert = fit_low_rank(error, moment, RANK)
        low, other = expert.up @ expert.down, up.double() @ down.double()
        row = dict(
            shape=[rows, columns],
            tokens=tokens,
            outputs_differ=float(((low - other) @ x.T).norm() / (other @ x.T).norm()),
            objective_over_theirs=_objective(error - low, moment) / _objective(error - other, moment),
        )
        print(json.dumps(row))


def _objective(error: Tensor, moment: Tensor) -> float:
    return float(((error @ moment) * error).sum())


if __name__ == "__main__":
    main(sys.argv[1])
