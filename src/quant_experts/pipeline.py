"""`quantize`: the one place that knows the order of the stages.

samples -> batches -> block streaming -> for each block: statistics -> for each input group: base, shared expert, routed
experts, router -> packed tensors, written at once -> hidden states move on through the quantized block -> checkpoint
and report.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_experts import __version__
from quant_experts.artifacts import (
    CalibrationBatch,
    Event,
    GroupRecord,
    Modality,
    QuantizedGroup,
    Sample,
)
from quant_experts.calibration.batches import count_tokens, make_batches
from quant_experts.calibration.measurement import measure_group
from quant_experts.calibration.memory import MemoryEstimate, PeakMemory, estimate_memory
from quant_experts.calibration.samples import load_samples
from quant_experts.calibration.sensitivity import sensitivity_batches
from quant_experts.calibration.statistics import (
    block_linears,
    collect_statistics,
    find_groups,
    held_out_among,
    split_held_out,
    without_small,
)
from quant_experts.calibration.streaming import BlockStream
from quant_experts.checkpoint.run_folder import RunFolder
from quant_experts.checkpoint.schema import CheckpointConfig, GroupSpec
from quant_experts.checkpoint.source import TensorFiles, spot_check, weight_files
from quant_experts.checkpoint.tensors import describe_group, group_state
from quant_experts.config import DEFAULT_SCOPES, QuantizationConfig, Recipe
from quant_experts.errors import QuantExpertsError
from quant_experts.group import fit_tokens_needed, quantize_group, split_rows
from quant_experts.quantizers.rtn import quantize_rtn
from quant_experts.runtime.loading import check_device, default_dtype, model_class, read_config, resolve
from quant_experts.runtime.modules import install_groups
from quant_experts.runtime.processor import load_processor, takes_images
from quant_experts.scale_search import ImageWeights, measure_image_weights, scale_search

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Progress = Callable[[int, int, str], None]
"""Called with (blocks done, blocks in all, what is going on)."""


@dataclass(frozen=True)
class QuantizationResult:
    """What a run did and how it went."""

    folder: Path
    config: CheckpointConfig
    records: tuple[GroupRecord, ...]
    events: tuple[Event, ...]
    samples: int
    tokens: dict[str, int]
    """Calibration tokens by modality name, held-out samples included."""
    seconds: float
    resumed_blocks: int
    estimated_bytes: int
    peak_bytes: int
    """Of the device that did the work; on a CPU above what the process held before."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of everything a quantized linear needs, over its weights."""
        return sum(r.stored_bits for r in self.records) / max(1, sum(r.weights for r in self.records))


def quantize(
    model: str | Path,
    samples: Any,
    output: str | Path,
    config: QuantizationConfig | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    on_estimate: Callable[[MemoryEstimate], None] | None = None,
) -> QuantizationResult:
    """Quantize a model with a handful of image-text samples and write a checkpoint.

    Args:
        model: folder or Hugging Face name of a vision-language (or text-only causal) model in safetensors.
        samples: anything `calibration.samples.load_samples` takes: a JSON or JSONL file, a folder of images with
            captions, a data set's name, or an iterable of (image, text).
        output: folder to create. A run that was interrupted goes on when the same call is repeated.
        config: scheme, recipe, scopes, seed and calibration limits; W4A6 with the default recipe if None.
        device: "cpu" or "cuda"; the GPU if there is one.
        dtype: compute dtype of the full-precision passes; float32 on a CPU, bfloat16 on a GPU.
        strict: raise where a layer is left out or a computation falls back, instead of recording an event.
        progress, on_estimate: called as the run goes on, and with the memory estimate before it starts.

    Raises:
        QuantExpertsError: for any input that cannot work, with one sentence that says why. Nothing half-written is left
            under `output`.
    """
    started = time.perf_counter()
    config = config or QuantizationConfig.of()
    device = str(check_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    dtype = dtype or default_dtype(device)
    peak = PeakMemory(torch.device(device))
    folder = resolve(model)
    model_config = _read_original(folder)
    run = _start(samples, folder, model_config, config, device, dtype, strict, progress)
    open_stream = _streams(folder, model_config, run)
    output = Path(output).expanduser().absolute()
    with RunFolder(output, _fingerprint(folder, run)) as store:
        stream = open_stream(run.batches)
        estimate = estimate_memory(stream, config.recipe)
        if on_estimate is not None:
            on_estimate(estimate)
        store.copy_rest(stream.skeleton.files, stream.skeleton.keys_outside_blocks())
        if run.weighed:
            again = partial(open_stream, run.weighed, skeleton=stream.skeleton, differentiable=True)
            run.image_weights = store.remember("image_weights", lambda: measure_image_weights(again()))
        checkpoint, records, resumed = run.blocks(stream, store)
        store.finish(folder, checkpoint, run.report(records))
    return QuantizationResult(
        folder=output,
        config=checkpoint,
        records=tuple(records),
        events=tuple(run.events),
        samples=len(run.batches),
        tokens=count_tokens(run.batches),
        seconds=time.perf_counter() - started,
        resumed_blocks=resumed,
        estimated_bytes=estimate.on(torch.device(device)),
        peak_bytes=peak.bytes(),
    )


@dataclass
class _Run:
    """What every block of one run needs to know."""

    config: QuantizationConfig
    device: str
    dtype: torch.dtype
    batches: Sequence[CalibrationBatch]
    held_out: frozenset[int]
    events: list[Event]
    strict: bool
    progress: Progress
    weighed: Sequence[CalibrationBatch]
    """Those that MBQ measures its weights on; none where it does not."""
    image_weights: Mapping[str, ImageWeights] = field(default_factory=dict)
    """MBQ's, by block name."""

    def note(self, events: Sequence[Event]) -> None:
        """Record events, or raise the first in a strict run."""
        if self.strict and events:
            raise QuantExpertsError(f"{events[0].where}: {events[0].what} (strict run).")
        self.events += events

    def report(self, records: Sequence[GroupRecord]) -> dict[str, Any]:
        """What is written beside the checkpoint."""
        return dict(
            config=self.config.to_json(),
            samples=len(self.batches),
            held_out_samples=len(self.held_out),
            tokens=count_tokens(self.batches),
            groups=[asdict(record) for record in records],
            events=[asdict(event) for event in self.events],
        )

    def blocks(self, stream: BlockStream, store: RunFolder) -> tuple[CheckpointConfig, list[GroupRecord], int]:
        """Quantize block after block, or take finished ones from the store. -> config, records, number of blocks
        taken."""
        names = stream.skeleton.block_names
        specs: list[GroupSpec] = []
        records: list[GroupRecord] = []
        resumed = 0
        for done, index in enumerate(stream.blocks()):
            self.progress(done, len(names), names[index])
            block = stream.skeleton.load_block(index, stream.device)
            if store.has_block(index):
                resumed += 1
            else:
                store.write_block(index, *self._quantize_block(stream, block, index, first=not specs))
            tensors, saved = store.read_block(index)
            groups = [GroupSpec.from_json(spec) for spec in saved["groups"]]
            local = {key.removeprefix(f"{saved['file_prefix']}."): value for key, value in tensors.items()}
            install_groups(block, groups, self.config.scheme, local, oracle=True)
            stream.advance(block)
            stream.skeleton.release_block(index)
            specs += [_with_prefix(spec, names[index]) for spec in groups]
            records += [GroupRecord(**record) for record in saved["records"]]
            self.note([Event(**event) for event in saved["events"]])
        for index in stream.never_run:
            self.note([Event(names[index], "no calibration sample ran through it: left in full precision")])
            if not store.has_block(index):
                store.write_block(index, stream.skeleton.file_names(index, {})[1], {})
        self.progress(len(names), len(names), "done")
        checkpoint = CheckpointConfig(
            format_version=self.config.scheme.format_version,
            scheme=self.config.scheme,
            recipe=self.config.recipe,
            seed=self.config.seed,
            groups=tuple(specs),
            ignore=tuple(stream.skeleton.unquantized_linears(spec.linears for spec in specs)),
        )
        return checkpoint, records, resumed

    def _choose_groups(
        self, stream: BlockStream, block: nn.Module, index: int, recipe: Recipe
    ) -> tuple[list[tuple[str, ...]], list[Event]]:
        """Groups of linears of a block that are quantized, and events of what stays in full precision.

        Raises `QuantExpertsError` if there is nothing to quantize.
        """
        prefix = stream.skeleton.block_names[index]
        groups, unused = find_groups(stream, block, together=recipe.group_inputs)
        if not groups:
            raise QuantExpertsError(
                f"Block '{prefix}' runs no linear layer (torch.nn.Linear): there is nothing to quantize in this model."
            )
        rank = max(recipe.shared_rank, recipe.routed_rank)
        groups, small = without_small(groups, block_linears(block), rank)
        if not groups:
            raise QuantExpertsError(
                f"Rank {rank} is larger than every layer of block '{prefix}', of {small[0][1]}, say: choose a smaller "
                "rank, or ranks that scale with the width (--scale-ranks)."
            )
        events = [Event(where, what) for where, what in stream.skeleton.unowned_weights(index)]
        events += [
            Event(f"{prefix}.{name}", f"{shape}, smaller than the rank of its experts: left in full precision")
            for name, shape in small
        ]
        events += [
            Event(f"{prefix}.{name}", "did not run on the first calibration sample: left in full precision")
            for name in unused
        ]
        return groups, events

    def _quantize_block(
        self, stream: BlockStream, block: nn.Module, index: int, *, first: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One block -> its tensors under file names, and its record (groups with names relative to the block).

        first: it is the first of the run, and so holds the checkpoint's guard.
        """
        prefix = stream.skeleton.block_names[index]
        recipe = self.config.recipe.at_width(stream.width)
        linears = block_linears(block)
        groups, events = self._choose_groups(stream, block, index, recipe)
        seed = self.config.seed * 100_003 + index
        held_out = held_out_among(stream.waiting)
        statistics = collect_statistics(
            stream,
            block,
            groups,
            important_channels=recipe.important_channels,
            held_out=held_out,
            seed=seed,
            fit_tokens=fit_tokens_needed(recipe),
        )
        search = scale_search(stream, block, groups, held_out, self.image_weights.get(prefix))
        tensors: dict[str, Tensor] = {}
        specs: list[GroupSpec] = []
        records: list[GroupRecord] = []
        for names in groups:
            weight = torch.cat([linears[name].weight.detach().float() for name in names])
            rows = [linears[name].out_features for name in names]
            where = f"{prefix}.{names[0]}"
            group, found = quantize_group(
                names,
                rows,
                weight,
                statistics[names],
                self.config.scheme,
                recipe,
                seed=seed,
                where=where,
                search=search,
            )
            specs.append(describe_group(group))
            plain = QuantizedGroup(names, split_rows(quantize_rtn(weight, self.config.scheme), rows))
            records.append(measure_group(group, plain, weight, rows, statistics.pop(names), self.config.scheme, prefix))
            events += found
            tensors |= group_state(group)
        file_prefix, rest = stream.skeleton.file_names(index, tensors, guard=first)
        record = dict(
            groups=[spec.to_json() for spec in specs],
            records=[asdict(record) for record in records],
            events=[asdict(event) for event in events],
            file_prefix=file_prefix,
        )
        return {f"{file_prefix}.{name}": value for name, value in tensors.items()} | rest, record


def _with_prefix(spec: GroupSpec, prefix: str) -> GroupSpec:
    """The group with names relative to the model instead of the block."""
    return spec.model_copy(update=dict(linears=tuple(f"{prefix}.{name}" for name in spec.linears)))


def _read_original(folder: Path) -> PretrainedConfig:
    """A model's configuration. Raises `QuantExpertsError` if the model is quantized."""
    model_config = read_config(folder)
    if getattr(model_config, "quantization_config", None) is not None:
        raise QuantExpertsError(f"'{folder}' is quantized already: give the original model.")
    return model_config


def _start(
    samples: Any,
    folder: Path,
    model_config: PretrainedConfig,
    config: QuantizationConfig,
    device: str,
    dtype: torch.dtype,
    strict: bool,
    progress: Progress | None,
) -> _Run:
    """Samples -> a run that has its batches and has quantized nothing."""
    batches, events = _calibration(samples, folder, model_config, config)
    held_out, more = split_held_out(len(batches))
    weighs_modalities = config.recipe.smoothing == "mbq" and "language" in config.scopes
    weighed = sensitivity_batches(batches, held_out) if weighs_modalities else []
    report = progress or (lambda *_: None)
    return _Run(config, device, dtype, batches, held_out, [*events, *more], strict, report, weighed)


def _streams(folder: Path, model_config: PretrainedConfig, run: _Run) -> Callable[..., BlockStream]:
    """What opens a stream of the run's model over batches."""
    return partial(
        BlockStream,
        folder,
        model_class(model_config),
        model_config,
        device=torch.device(run.device),
        dtype=run.dtype,
        scopes=run.config.scopes,
    )


def _calibration(
    source: Any, folder: Path, model_config: PretrainedConfig, config: QuantizationConfig
) -> tuple[list[CalibrationBatch], list[Event]]:
    """Samples -> batches, with the events of both steps."""
    loaded: list[Sample]
    loaded, events = load_samples(source, limit=config.samples, max_pixels=config.max_pixels)
    processor = load_processor(folder)
    batches, more = make_batches(loaded, processor, model_config, max_tokens=config.max_tokens)
    if config.scopes != DEFAULT_SCOPES and takes_images(processor):
        more = [*more, *_check_images(batches, config)]
    return batches, [*events, *more]


def _check_images(batches: Sequence[CalibrationBatch], config: QuantizationConfig) -> list[Event]:
    """Scopes in front of the language model are calibrated by images alone. Raises `QuantExpertsError` without any."""
    images = sum(bool((batch.modality == Modality.IMAGE).any()) for batch in batches)
    if not images:
        scopes = " and ".join(scope for scope in config.scopes if scope != "language")
        raise QuantExpertsError(
            f"No image would run through {scopes}: none of {len(batches)} samples has one. Calibrate with images, or "
            "choose the scope language alone."
        )
    few = images == 1 < len(batches)
    what = "one sample with an image only: in front of the language model errors are measured on what was fitted to"
    return [Event("calibration", what)] if few else []


def _fingerprint(folder: Path, run: _Run) -> dict[str, Any]:
    """What two runs must share for one to finish the other's work."""
    digest = hashlib.sha256()
    for batch in run.batches:
        for name, tensor in sorted(batch.inputs.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    names = hashlib.sha256(repr(sorted(TensorFiles(folder).shapes.items())).encode()).hexdigest()
    from transformers import __version__ as transformers_version

    return dict(
        versions={"quant_experts": __version__, "torch": torch.__version__, "transformers": transformers_version},
        config=run.config.to_json(),
        device=torch.device(run.device).type,
        dtype=str(run.dtype),
        threads=torch.get_num_threads(),
        samples=digest.hexdigest(),
        model={"tensors": names, "files": {path.name: spot_check(path) for path in weight_files(folder)}},
    )
