"""Our checkpoints as a quantization method of vLLM. Imported by vLLM's processes only (`plugin.py`).

vLLM makes its own model and asks for each linear layer how to store and compute it. `LayerPlan` answers which linears
of the checkpoint the layer holds, `FusedLinears` holds and computes them.

Under `torch.compile` a layer is one operation that finds the layer by its name, as vLLM's attention does. The number of
an input group (`modules.group_outputs`) would not do: vLLM keeps compiled graphs on disk, for processes that count
otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.transformers_utils.config import get_safetensors_params_metadata

from quant_experts.checkpoint.schema import QUANT_METHOD, CheckpointConfig
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.vllm.fused import FusedLinears, Spread
from quant_experts.runtime.vllm.plan import LayerPlan, Part

REORDERED = ("llama4", "llama4_text", "falcon", "bloom")
"""Model types whose classes in vLLM change the order of a tensor's rows on the way in, of some tensors only. Nothing
would tell: shapes stay."""
ABSORBED = "kv_b_proj"
"""Last part of the name of a linear that vLLM multiplies into others, in attention with compressed keys and values."""
QUANTIZED = "quantized"
"""Name of the `FusedLinears` in a layer of vLLM."""


class QuantExpertsVllmConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not there when types are checked
    """`CheckpointConfig` as vLLM asks for it. At module level and plain, because vLLM sends it to other processes."""

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.plan = LayerPlan(checkpoint)
        self.spread: Spread = {}
        self.whole = True
        """Whether this process makes the whole model."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantExpertsVllmConfig:
        """From `quantization_config` of config.json. Raises `QuantExpertsError` if it is not one that we can read."""
        return cls(CheckpointConfig.read(config))

    def get_name(self) -> str:
        """As in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every dtype that models compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None: the reference backend runs wherever PyTorch does."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called once, with the model's folder or its name on the hub. Without a list of its tensors (a hub that does
        not answer) the names in config.json must do. Raises `QuantExpertsError` for a model in REORDERED."""
        kind = getattr(hf_config, "model_type", None)
        if kind in REORDERED:
            raise QuantExpertsError(
                f"vLLM reorders outputs of {kind}'s linears while it loads them, which is not supported for quantized "
                "ones: load the checkpoint with transformers."
            )
        tensors = get_safetensors_params_metadata(model_name, revision=revision)
        if tensors:
            headers = {name: header["shape"] for name, header in tensors.items() if name != "__metadata__"}
            self.plan.use_files(headers)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called for each model class, the outer one first."""
        self.plan.rename(hf_to_vllm_mapper.map_name)

    def get_checkpoint_weight_mapper(self) -> Any:
        """vLLM asks for renamings when the model is made and before it reads files: the moment to name a linear that
        the model has no place for, of whose tensors its loader would say less, or nothing."""
        self.check_all_found()
        return super().get_checkpoint_weight_mapper()

    def check_all_found(self) -> None:
        """Raises `QuantExpertsError` if no layer stands for a quantized linear."""
        if self.whole:
            self.plan.check_all_found()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """For a linear layer ours or that of full precision; None for embeddings, heads, attention and experts, which
        are never quantized."""
        if not isinstance(layer, LinearBase):
            return None
        self.whole = get_current_vllm_config().parallel_config.pipeline_parallel_size == 1
        parts = self.plan.parts(prefix, self.packed_modules_mapping)
        if not parts:
            return UnquantizedLinearMethod()
        if get_tensor_model_parallel_world_size() > 1:
            raise QuantExpertsError(
                "The layers of a quantized checkpoint are not split over devices: start vLLM with "
                "tensor_parallel_size=1."
            )
        if prefix.rpartition(".")[2] == ABSORBED:
            raise QuantExpertsError(
                f"vLLM needs the weight of '{prefix}' itself, which is quantized: load the checkpoint with "
                "transformers."
            )
        return QuantExpertsLinearMethod(self, parts)


class QuantExpertsLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """How one layer stores and computes its linears."""

    def __init__(self, config: QuantExpertsVllmConfig, parts: tuple[Part, ...]) -> None:
        self.config, self.parts = config, parts

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty quantized linears on the current device."""
        scheme = self.config.checkpoint.scheme
        fused = FusedLinears(self.parts, scheme, output_partition_sizes, input_size, self.config.spread)
        layer.add_module(QUANTIZED, fused)
        fused.add_inlets(layer)
        known = get_current_vllm_config().compilation_config.static_forward_context
        if layer.prefix in known:
            raise QuantExpertsError(f"vLLM's model has two layers '{layer.prefix}': it cannot hold quantized ones.")
        known[layer.prefix] = layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and lay it out."""
        self.config.check_all_found()
        fused = layer.get_submodule(QUANTIZED)
        assert isinstance(fused, FusedLinears)
        fused.remove_inlets(layer)
        bias = None if layer.skip_bias_add else layer.bias  # added by who called the layer, where it is skipped
        fused.finalize(bias, layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N). The linears add the layer's bias, the only one that vLLM gives. Raises
        `QuantExpertsError` if it gives none where there is one."""
        if bias is None and layer.bias is not None and not layer.skip_bias_add:
            raise QuantExpertsError(
                f"vLLM asks for outputs of '{layer.prefix}' without its bias, which is not supported: load the "
                "checkpoint with transformers."
            )
        traced = torch.compiler.is_compiling()
        width = sum(layer.output_partition_sizes)
        outputs: Tensor = layer_outputs(x, layer.prefix, width) if traced else layer.get_submodule(QUANTIZED)(x)
        return outputs


@torch.library.custom_op(
    "quant_experts::layer_outputs", mutates_args=(), schema="(Tensor x, str layer, int width) -> Tensor"
)
def layer_outputs(x: Tensor, layer: str, width: int) -> Tensor:
    """What tracing sees of the layer of that name: x (..., K) -> (..., width) in x's dtype."""
    outputs: Tensor = get_forward_context().no_compile_layers[layer].get_submodule(QUANTIZED)(x)
    return outputs


@layer_outputs.register_fake
def _shape(x: Tensor, layer: str, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def register() -> None:
    """Make vLLM find the method by the name in config.json."""
    register_quantization_config(QUANT_METHOD)(QuantExpertsVllmConfig)
