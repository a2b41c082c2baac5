"""Every family: quantize, save, load in a program that knows `transformers` only, show an image, save and load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import python, small_batches
from tiny_models import FAMILIES, VISION_FAMILIES
from torch import nn

import quant_experts
from quant_experts.checkpoint.inspection import inspect_checkpoint
from quant_experts.checkpoint.schema import CheckpointConfig
from quant_experts.config import DEFAULT_SCOPES, RECIPES, SCOPES
from quant_experts.runtime.modules import QuantizedLinear

DEFAULT = RECIPES["quant-experts"].to_json()
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {family: (family, "W4A6", {}) for family in FAMILIES} | {
    "weight-only": ("qwen2_vl", "W3A16", {}),
    "asymmetric": ("qwen2_vl", "W4A8g32-asym", {}),
    "grouped": ("qwen2_vl", "W4A6", {"group_inputs": True}),
    "plain": ("qwen2_vl", "W4A6", {"smoothing": "none", "exempt": "none", "shared_rank": 0, "routed_rank": 0}),
    "default": ("qwen3_vl", "W4A6", DEFAULT | {"shared_rank": 4}),
    "default, fp8": ("qwen2_5_vl", "W4Afp8", DEFAULT | {"shared_rank": 4}),
    "fp8 in groups": ("qwen2_vl", "W4Afp8g32-asym", {}),
    "default, weight-only": ("internvl", "W3A16", DEFAULT | {"shared_rank": 4}),
    "tied": ("qwen2_vl", "W4A6", {"tie_embeddings": True}),
    "bfloat16": ("qwen2_5_vl", "W4A6", {"dtype": torch.bfloat16}),
    "vision": ("qwen2_vl", "W4A6", {"scopes": ("vision",)}),
    "merger": ("qwen3_vl", "W4A6", {"scopes": ("merger",)}),
    "vision and language, default": ("qwen2_5_vl", "W3A16", DEFAULT | {"shared_rank": 4, "scopes": SCOPES[::2]}),
    **{f"{family}, all scopes": (family, "W4A6", {"scopes": SCOPES, "routed_rank": 0}) for family in VISION_FAMILIES},
    "routed experts everywhere": ("qwen3_vl", "W4A6", {"scopes": SCOPES}),
}
Found = dict[str, Any]


@pytest.fixture(scope="module")
def elsewhere(
    tiny: Callable[..., Path], quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    """For each run: the folders, the inputs, and what another program got from the checkpoint."""
    place = tmp_path_factory.mktemp("elsewhere")
    runs: dict[str, Found] = {}
    jobs = []
    for name, (family, scheme, changes) in RUNS.items():
        folder, original = quantized(family, scheme, **changes), tiny(family, **original_options(changes))
        inputs = small_batches(family, folder, 1)[0].inputs
        save_file({key: value.contiguous() for key, value in inputs.items()}, place / f"{name}.inputs")
        auto = "AutoModelForImageTextToText" if family in VISION_FAMILIES else "AutoModelForCausalLM"
        output = str(place / name)
        jobs.append(dict(folder=str(folder), inputs=str(place / f"{name}.inputs"), output=output, auto=auto))
        runs[name] = dict(folder=folder, original=original, inputs=inputs, output=Path(output))
    (place / "jobs.json").write_text(json.dumps(jobs))
    done = python(Path(__file__).parent / "loading_elsewhere.py", place / "jobs.json")
    assert done.returncode == 0, done.stderr
    for run in runs.values():
        error = run["output"].with_suffix(".error")
        run["error"] = error.read_text() if error.exists() else None
        run["found"] = load_file(run["output"]) if run["output"].exists() else {}
    return runs


def original_options(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key in ("tie_embeddings", "dtype")}


@pytest.mark.parametrize("name", RUNS)
def test_another_program_gets_the_same(elsewhere: dict[str, Found], name: str) -> None:
    run = elsewhere[name]
    assert run["error"] is None, run["error"]
    model = quant_experts.load(run["folder"])
    with torch.inference_mode():
        logits = model(**run["inputs"]).logits
        tokens = model.generate(**run["inputs"], max_new_tokens=6, do_sample=False)
    assert logits.isfinite().all() and logits.std() > 0
    assert torch.equal(run["found"]["logits"], logits)
    assert torch.equal(run["found"]["tokens"], tokens)
    assert torch.equal(run["found"]["saved"], logits), "save_pretrained and from_pretrained change the model"
    assert torch.equal(run["found"]["placed"], logits), "device_map='auto' changes the model"


@pytest.mark.parametrize("name", RUNS)
def test_the_scopes_are_quantized_and_nothing_else(elsewhere: dict[str, Found], name: str) -> None:
    run = elsewhere[name]
    original, model = quant_experts.load(run["original"]), quant_experts.load(run["folder"])
    linears = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    inside = {linear for linear in linears if scope_of(linear) in RUNS[name][2].get("scopes", DEFAULT_SCOPES)}
    assert sum(scope_of(linear) == "language" for linear in linears) == 2 * 7 and inside < linears
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == inside
    config = CheckpointConfig.read(json.loads((run["folder"] / "config.json").read_text())["quantization_config"])
    assert sorted(name for group in config.groups for name in group.linears) == sorted(inside)
    assert set(config.ignore) == linears - inside
    assert sum(len(group["linears"]) for group in inspect_checkpoint(run["folder"])["groups"]) == len(inside)
    after = model.state_dict()
    for key, value in original.state_dict().items():
        if key.removesuffix(".weight") not in inside:
            assert torch.equal(after[key], value), key


def scope_of(linear: str) -> str:
    """By what the families call things."""
    if "merger" in linear or "projector" in linear:
        return "merger"
    return "head" if linear == "lm_head" else "vision" if "vis" in linear else "language"


@pytest.mark.parametrize("name", RUNS)
def test_the_quantized_model_resembles_the_original(elsewhere: dict[str, Found], name: str) -> None:
    """Random weights would not: each answer token's logits point the way the original's do."""
    run = elsewhere[name]
    with torch.inference_mode():
        exact = quant_experts.load(run["original"])(**run["inputs"]).logits.double()
        logits = quant_experts.load(run["folder"])(**run["inputs"]).logits.double()
    error = (logits - exact).square().sum() / exact.square().sum()
    assert 0 < error < (0.1 if RUNS[name][1].startswith("W4") else 0.2), error
