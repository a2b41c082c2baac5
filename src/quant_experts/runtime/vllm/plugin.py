"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins` of this package."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM the quantization method of our checkpoints; again changes nothing."""
    from quant_experts.runtime.vllm import engine  # needs vLLM, and imports torch

    engine.register()
