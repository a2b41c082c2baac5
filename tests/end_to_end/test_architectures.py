"""Architectures that no line of the package knows: quantize, load through `transformers`, answer nearly as before.

Their processors are left out: batches are what these would make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from quant_experts import QuantExpertsError, QuantizationConfig, Recipe, pipeline
from quant_experts.artifacts import CalibrationBatch, Modality
from quant_experts.calibration.scopes import scope_modules
from quant_experts.calibration.skeleton import Skeleton
from quant_experts.config import RECIPES
from quant_experts.runtime.modules import QuantizedLinear

IMAGE, SIDE = 590, 56
TEXT: dict[str, Any] = dict(
    vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=14
)


@dataclass(frozen=True)
class Architecture:
    """What is special about one: its configuration, how many tokens an image has, and what goes in with them."""

    config: Callable[[], transformers.PreTrainedConfig]
    image_tokens: int = 0
    inputs: Callable[[Tensor, torch.Generator], dict[str, Tensor]] = lambda ids, generator: {}
    """(ids, generator) -> further arguments of the model."""
    tolerance: float = 0.025
    """Of the logits: norms that scale by 1 + weight amplify."""
    in_full_precision: tuple[str, ...] = ()
    """Pieces of the names of linears that are to stay."""


def pixels(*shape: int, **more: Any) -> Callable[[Tensor, torch.Generator], dict[str, Tensor]]:
    """Noise as `pixel_values` of a shape, and tensors of numbers."""
    return lambda ids, generator: {
        "pixel_values": torch.randn(*shape, generator=generator),
        **{name: torch.tensor(value) for name, value in more.items()},
    }


def gemma3() -> transformers.PreTrainedConfig:
    text = dict(TEXT, sliding_window=8, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"])
    return transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE
    )


def gemma3_inputs(ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    image = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return {"pixel_values": image, "token_type_ids": (ids == IMAGE).long()}


def mllama() -> transformers.PreTrainedConfig:
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    vision = dict(VISION, attention_heads=4, num_global_layers=1, vision_output_dim=192)
    return transformers.MllamaConfig(
        text_config=dict(text, num_hidden_layers=3, cross_attention_layers=[1]),
        vision_config=dict(vision, intermediate_layers_indices=[0, 1], supported_aspect_ratios=[[1, 1], [1, 2]]),
        image_token_index=IMAGE,
    )


def mllama_inputs(ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    image = pixels(1, 1, 4, 3, SIDE, SIDE, aspect_ratio_ids=[[1]], aspect_ratio_mask=[[[1, 0, 0, 0]]])
    return image(ids, generator) | {"cross_attention_mask": torch.ones(1, ids.shape[1], 1, 4, dtype=torch.long)}


def llama4() -> transformers.PreTrainedConfig:
    experts = dict(num_local_experts=4, intermediate_size_mlp=128, interleave_moe_layer_step=1)
    text = dict(TEXT, **experts, no_rope_layers=[1, 0], attention_chunk_size=16)
    vision = dict(VISION, vision_output_dim=64, projector_input_dim=64, projector_output_dim=64)
    return transformers.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)


def qwen3_5() -> transformers.PreTrainedConfig:
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0, mrope_section=[2, 3, 3])
    return transformers.Qwen3_5Config(
        text_config=dict(TEXT, **linear, layer_types=["linear_attention", "full_attention"], rope_parameters=rope),
        vision_config=dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=64),
        image_token_id=IMAGE,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(
        lambda: transformers.LlavaConfig(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=dict(VISION, model_type="clip_vision_model", projection_dim=64),
            image_token_index=IMAGE,
        ),
        16,
        pixels(1, 3, SIDE, SIDE),
    ),
    "smolvlm": Architecture(
        lambda: transformers.SmolVLMConfig(
            text_config=dict(TEXT, model_type="llama"), vision_config=VISION, scale_factor=2, image_token_id=IMAGE
        ),
        4,
        pixels(1, 1, 3, SIDE, SIDE),
    ),
    "mistral3": Architecture(
        lambda: transformers.Mistral3Config(
            text_config=dict(TEXT, model_type="mistral"),
            vision_config=dict(VISION, model_type="pixtral", head_dim=16),
            image_token_index=IMAGE,
        ),
        4,
        pixels(1, 3, SIDE, SIDE, image_sizes=[[SIDE, SIDE]]),
    ),
    "two kinds of attention (gemma3)": Architecture(gemma3, 4, gemma3_inputs, 0.06),
    "cross-attention (mllama)": Architecture(mllama, 1, mllama_inputs),
    "fused experts, and a router that is a linear (llama4)": Architecture(llama4, in_full_precision=("router",)),
    "convolutions (lfm2_vl)": Architecture(
        lambda: transformers.Lfm2VlConfig(
            text_config=dict(TEXT, model_type="lfm2", layer_types=["conv", "full_attention"], block_ff_dim=128),
            vision_config=dict(VISION, num_patches=16),
            image_token_id=IMAGE,
        ),
        tolerance=0.04,
    ),
    "linear attention (qwen3_5)": Architecture(qwen3_5, tolerance=0.06),
    "an initialiser that wants the linears' weights (falcon_mamba)": Architecture(
        lambda: transformers.FalconMambaConfig(**TEXT | dict(head_dim=None, state_size=8)),
        in_full_precision=("dt_proj",),  # whose weight is read without calling it
    ),
}


def without_image(batch: CalibrationBatch) -> CalibrationBatch:
    text = batch.modality != Modality.IMAGE
    ids = batch.inputs["input_ids"][:, text]
    return CalibrationBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, batch.modality[text])


def some_batch(architecture: Architecture, seed: int) -> CalibrationBatch:
    generator = torch.Generator().manual_seed(seed)
    text, answer = (torch.randint(5, 500, (n,), generator=generator) for n in (8 + seed % 3, 8))
    ids = torch.cat([text[:4], torch.full((architecture.image_tokens,), IMAGE), text[4:], answer])[None]
    modality = torch.full(ids[0].shape, int(Modality.TEXT), dtype=torch.int8)
    modality[-8:] = int(Modality.ANSWER)
    modality[ids[0] == IMAGE] = int(Modality.IMAGE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | architecture.inputs(ids, generator)
    return CalibrationBatch(inputs, modality)


def auto(config: transformers.PreTrainedConfig) -> Any:
    """The class of `transformers` that makes such a model."""
    visual = "vision_config" in config.sub_configs
    return transformers.AutoModelForImageTextToText if visual else transformers.AutoModelForCausalLM


def made(architecture: Architecture, folder: Path) -> Any:
    """A random model, written to a folder as well."""
    config = architecture.config()
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = auto(config).from_config(config).eval()
    for parameter in model.parameters():  # some are made without being filled
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    model.save_pretrained(folder)
    return model


DEFAULT = RECIPES["quant-experts"].model_copy(update={"shared_rank": 4})


def quantize(
    folder: Path, batches: list[CalibrationBatch], monkeypatch: pytest.MonkeyPatch, recipe: Recipe = DEFAULT
) -> tuple[Any, list[str]]:
    """-> the quantized model as `transformers` loads it, and the linears that are quantized."""
    monkeypatch.setattr(pipeline, "_calibration", lambda *arguments: (batches, []))
    output = folder.with_name("quantized")
    result = pipeline.quantize(folder, None, output, QuantizationConfig.of("W8A8", recipe), device="cpu")
    kind = auto(transformers.AutoConfig.from_pretrained(output))
    loaded = kind.from_pretrained(output, dtype=torch.float32)
    return loaded, [linear for group in result.config.groups for linear in group.linears]


def check_logits(model: Any, loaded: Any, batch: CalibrationBatch, tolerance: float) -> None:
    with torch.inference_mode():
        expected, logits = model(**batch.inputs).logits, loaded(**batch.inputs).logits
        assert (logits - expected).norm() < tolerance * expected.norm()
        if "pixel_values" in batch.inputs:
            black = batch.inputs | {"pixel_values": torch.zeros_like(batch.inputs["pixel_values"])}
            seen = (model(**black).logits - expected).norm()
            assert seen > 1.2 * tolerance * expected.norm(), "the image counts"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES[name]
    batches = [some_batch(architecture, seed) for seed in range(5)]
    model = made(architecture, tmp_path / "original")
    loaded, quantized = quantize(tmp_path / "original", batches, monkeypatch)
    linears = {
        f"{block}.{linear}"
        for block in scope_modules(model, "language")
        for linear, module in model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear) and not any(piece in linear for piece in architecture.in_full_precision)
    }
    assert linears == set(quantized)
    assert linears == {linear for linear, module in loaded.named_modules() if isinstance(module, QuantizedLinear)}
    for batch in batches:
        check_logits(model, loaded, batch, architecture.tolerance)
    with torch.inference_mode():
        inputs = batches[0].inputs
        tokens = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
        first = loaded(**inputs).logits[0, -1].argmax()
    assert tokens[0, inputs["input_ids"].shape[1]] == first


def test_buffers_that_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the module's own initialiser computes them, it leaves the weights beside them as they are in the files;
    where it does not (Falcon-H1), the model is refused instead of being calibrated with what memory held."""
    mamba = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)
    architecture = Architecture(lambda: transformers.FalconH1Config(**TEXT | mamba))
    model = made(architecture, tmp_path / "original")
    batches = [some_batch(architecture, seed) for seed in range(3)]
    with pytest.raises(QuantExpertsError, match=r"mamba\.mup_vector' is neither stored nor computed by its own module"):
        quantize(tmp_path / "original", batches, monkeypatch)
    initialise = type(model)._init_weights

    def with_buffers(self: Any, module: nn.Module) -> None:
        initialise(self, module)
        if hasattr(module, "mup_vector"):
            module.mup_vector.copy_(model.model.layers[0].mamba.mup_vector)

    load_block, brought_in = Skeleton.load_block, []

    def compared(self: Skeleton, index: int, device: torch.device) -> nn.Module:
        block, expected = load_block(self, index, device), model.get_submodule(self.block_names[index])
        found = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        for name, tensor in [*expected.named_parameters(), *expected.named_buffers()]:
            assert torch.equal(found[name], tensor), name
        brought_in.extend(found)
        return block

    monkeypatch.setattr(type(model), "_init_weights", with_buffers)
    monkeypatch.setattr(Skeleton, "load_block", compared)
    (tmp_path / "again").mkdir()
    (tmp_path / "original").rename(tmp_path / "again" / "original")
    loaded, _ = quantize(tmp_path / "again" / "original", batches, monkeypatch)
    assert {"mamba.mup_vector", "mamba.A_log", "mamba.dt_bias"} <= set(brought_in)
    for batch in batches:
        check_logits(model, loaded, batch, 0.03)


@pytest.mark.parametrize("recipe", [DEFAULT, RECIPES["mbq"]], ids=lambda recipe: recipe.name)  # mbq: gradients too
def test_blocks_that_only_images_reach(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples without an image skip cross-attention, whichever sample comes first; without any image there is nothing
    to calibrate it with."""
    architecture = ARCHITECTURES["cross-attention (mllama)"]
    model = made(architecture, tmp_path / "original")
    batches = [some_batch(architecture, seed) for seed in range(6)]
    text = [without_image(batch) for batch in batches]
    mixed = [text[0], batches[1], text[2], batches[3], batches[4]]
    loaded, quantized = quantize(tmp_path / "original", mixed, monkeypatch, recipe)
    assert any("cross_attn" in linear for linear in quantized)
    for batch in (batches[5], text[5]):
        check_logits(model, loaded, batch, architecture.tolerance)
    (tmp_path / "again").mkdir()
    model.save_pretrained(tmp_path / "again" / "original")
    with pytest.raises(QuantExpertsError, match=r"layers\.1'.*calibrate with samples that have some"):
        quantize(tmp_path / "again" / "original", text, monkeypatch, recipe)
