"""Which linears are timed on GPUs: the groups of a block of each model, and what is compared."""

from __future__ import annotations

from quant_experts.config import RECIPES

GROUPS = ("qkv", "o", "gate+up", "down")
SHAPES = {  # (N, K) of each group
    "Qwen2-VL-7B": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "Qwen2-VL-72B": ((10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568)),
    "InternVL2-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Qwen2-VL-2B": ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)),
}
RANK, EXPERTS = 32, 8
RECIPE = RECIPES["quant-experts"]
BASELINES = ("bf16", "cublas_int8", "cublas_fp8", "reading")
LAYERS = {
    "without_experts": "no experts",
    "with_experts": f"{EXPERTS} routed experts and a shared one, rank {RANK} + {RANK}",
    "default": f"default recipe: rotation {RECIPE.rotation}, static expert of rank {RECIPE.shared_rank}, reads codes",
}
FP8_LAYERS = {f"fp8_{kind}": f"{title}; fp8 activations" for kind, title in LAYERS.items()}
OURS = LAYERS | FP8_LAYERS
KINDS = (*BASELINES, *OURS)
HEADS = dict(bf16="bf16", cublas_int8="`_int_mm`", cublas_fp8="`_scaled_mm`", reading="reading") | {
    f"{prefix}{kind}": f"{prefix.replace('_', ' ')}{head}"
    for prefix in ("", "fp8_")
    for kind, head in dict(without_experts="no experts", with_experts="experts", default="default").items()
}
