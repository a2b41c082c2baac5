"""Random-weight models of a chosen size, for figures that do not depend on what the weights mean (time, memory)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config


def text_config(hidden: int, intermediate: int, blocks: int, *, vocabulary: int = 4096, heads: int = 16) -> Qwen2Config:
    """A Qwen2 text model with grouped-query attention, 4 query heads to a key head."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def write_random_model(folder: Path, config: Qwen2Config, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> int:
    """Write a checkpoint block by block, one shard each, without ever holding the model. -> bytes of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    assert config.num_key_value_heads is not None
    kv = config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size

    def normal(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
        return values.to(dtype)

    weight_map: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    write(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": normal(config.vocab_size, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=dtype),
        },
    )
    for i in range(config.num_hidden_layers):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        tensors = {f"model.layers.{i}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"model.layers.{i}.self_attn.{name}.bias"] = torch.zeros(
                shapes[f"self_attn.{name}"][0], dtype=dtype
            )
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
        write(f"block-{i:03d}.safetensors", tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["Qwen2ForCausalLM"]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    return total
