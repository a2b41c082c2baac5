"""Peers of the field on the bundled model, calibrated and scored as our recipes are.

Each peer runs in a virtual environment of its own, made here, on the same 128 calibration sequences, token for token;
only the language model's linears are quantized. It hands back dequantized weights, which this harness scores beside our
own rows, and logits of its own forward pass, which must agree with the harness's. What is finished is not done again;
a peer that fails is named with its last line of output, and the others go on.

Prints Markdown tables and writes benchmarks/results/peers.json.

    python benchmarks/peers/run.py [--envs FOLDER] [--output FOLDER] [--peers llmcompressor-gptq,...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from exchange import Grid, last_logits, read_samples, write_samples
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_experts.artifacts import CalibrationBatch
from quant_experts.calibration.batches import make_batches
from quant_experts.config import QuantizationConfig, find_recipe
from quant_experts.evaluation.bench import Bench, Contender, Outcome
from quant_experts.evaluation.bootstrap import difference_interval
from quant_experts.evaluation.fidelity import answer_kl, answer_log_probs, answer_nll
from quant_experts.evaluation.generation import generate_answers
from quant_experts.evaluation.scoreboard import table
from quant_experts.evaluation.scorers import SCORERS
from quant_experts.evaluation.scoring import open_model
from quant_experts.evaluation.task import Task, library_versions, open_task
from quant_experts.runtime.loading import read_config
from quant_experts.runtime.processor import load_processor

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "peers.json"
OURS = "W3A16-bare,W3A16,W4A16-sym-bare,W4A16-bare,W4A16,W4A8"
SAMPLES = 128
SAME_BITS = 0.1
"""Stored bits per weight that differ by no more count as the same."""
TOLERANCE = 1e-3
"""Of logits, relative to their norm, between a peer's forward pass and the harness's."""


@dataclass(frozen=True)
class Peer:
    """One method of a package."""

    label: str
    package: str
    """Names the requirement file and the environment."""
    script: str
    method: str
    scheme: str
    """Under which it is listed; peers and our rows of one scheme are compared."""


PEERS = {
    "llmcompressor-gptq": Peer("llm-compressor GPTQ", "llmcompressor", "llm_compressor.py", "gptq", "W4A16"),
    "llmcompressor-awq": Peer("llm-compressor AWQ", "llmcompressor", "llm_compressor.py", "awq", "W4A16"),
    "llmcompressor-w8a8": Peer(
        "llm-compressor SmoothQuant + GPTQ", "llmcompressor", "llm_compressor.py", "smoothquant-gptq", "W8A8"
    ),
    "autoround-light": Peer("AutoRound light", "autoround", "auto_rounding.py", "light", "W4A16"),
    "autoround": Peer("AutoRound", "autoround", "auto_rounding.py", "default", "W4A16"),
    "gptqmodel-eora-8": Peer("GPTQModel GPTQ + EoRA, rank 8", "gptqmodel", "gptq_model.py", "eora-8", "W4A16"),
    "gptqmodel-eora-16": Peer("GPTQModel GPTQ + EoRA, rank 16", "gptqmodel", "gptq_model.py", "eora-16", "W4A16"),
}


def our_row(name: str) -> Contender:
    """`SCHEME`, or `SCHEME-bare`: without the static expert, which brings the bits down to the peers'."""
    scheme = name.removesuffix("-bare")
    recipe = find_recipe("quant-experts")
    if scheme != name:
        recipe = recipe.model_copy(update=dict(name="quant-experts without expert", shared_rank=0))
    config = QuantizationConfig.of(scheme, recipe, scale_with_width=True, seed=0, samples=SAMPLES)
    return Contender(config.recipe.name, config, str(config.scheme))


def environment(package: str, envs: Path) -> Path:
    """The interpreter of a package's environment, which is made on the first call.

    What `requirements-<package>-alone.txt` names is installed without what it asks for: a package that asks for a torch
    that has no build for CPUs.
    """
    folder = envs / package
    python = folder / "bin" / "python"
    steps = {HERE / f"requirements-{package}.txt": [], HERE / f"requirements-{package}-alone.txt": ["--no-deps"]}
    steps = {file: options for file, options in steps.items() if file.is_file()}
    wanted = "".join(file.read_text() for file in steps)
    done = folder / "installed.txt"
    if not done.is_file() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for file, options in steps.items():
            subprocess.run([str(python), "-m", "pip", "install", "-q", *options, "-r", str(file)], check=True)
        done.write_text(wanted)
    return python


def quantize_with(peer: Peer, task: Task, samples: Path, envs: Path, output: Path, limit: int) -> None:
    """Let the peer make its folder, unless it is there. Raises CalledProcessError or TimeoutExpired."""
    if (output / "facts.json").is_file():
        return
    python = environment(peer.package, envs)
    log = output.with_suffix(".log")
    settings = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    command = [str(python), str(HERE / peer.script), peer.method, str(task.model), str(samples), str(output)]
    with log.open("w") as file:
        subprocess.run(
            command,
            env=os.environ | settings,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
            timeout=limit,
            cwd=output.parent,
        )


def int8_per_token(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round activations as compressed-tensors does for int8 per token, symmetric: the grid's 255 steps span twice the
    largest magnitude."""
    x = inputs[0]
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127.5).clamp_min(torch.finfo(x.dtype).eps)
    return ((x / scale).round().clamp(-128, 127) * scale, *inputs[1:])


def install(model: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Turn the full-precision model into the peer's. Raises ValueError if the tensors are not those of its language
    model."""
    weights = load_file(folder / "weights.safetensors")
    own = {name: p for name, p in model.named_parameters() if name.startswith("model.language_model.")}
    if own.keys() != weights.keys():
        raise ValueError(f"names differ: {sorted(own.keys() ^ weights.keys())[:4]}")
    for name, parameter in own.items():
        parameter.data.copy_(weights[name])
    linears = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.startswith("model.language_model.")
    }
    if sorted(linears) != facts["linears"]:
        raise ValueError(f"other linears were quantized: {sorted(linears.keys() ^ set(facts['linears']))[:4]}")
    bits = Grid(**facts["grid"]).activation_bits
    if bits not in (8, 16):
        raise ValueError(f"activations of {bits} bits are not known here")
    for linear in linears.values() if bits == 8 else ():
        linear.register_forward_pre_hook(int8_per_token)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Between logits."""
    return float((ours - theirs).norm() / theirs.norm())


class Harness:
    """Scores peers as `Bench` scores checkpoints."""

    def __init__(self, task: Task, samples: Path) -> None:
        self.task, self.samples = task, read_samples(samples)

    @cached_property
    def _batches(self) -> list[CalibrationBatch]:
        return self.task.batches()

    @cached_property
    def _reference(self) -> list[Tensor]:
        """Full precision's log-probabilities."""
        model, _ = open_model(self.task.model, device=self.task.device)
        return answer_log_probs(model, self._batches)

    def outcome(self, peer: Peer, folder: Path) -> tuple[Outcome, dict[str, Any]]:
        """The peer's scores, and by how much its own forward pass differs; read back if an earlier call found them.

        Raises ValueError where that is more than rounding.
        """
        facts = json.loads((folder / "facts.json").read_text())
        key = dict(questions=self.task.question_key, versions=library_versions(), seconds=facts["seconds"])
        file = folder / "scores.json"
        saved = json.loads(file.read_text()) if file.is_file() else {}
        if saved.get("key") != key:
            model, processor = open_model(self.task.model, device=self.task.device)
            install(model, folder, facts)
            theirs = load_file(folder / "logits.safetensors")["logits"]
            saved = dict(key=key, differs_by=relative_difference(last_logits(model, self.samples), theirs))
            if not saved["differs_by"] < TOLERANCE:
                raise ValueError(f"the harness computes another model: logits differ by {saved['differs_by']:.1e}")
            saved["scores"] = self._score(model, processor)
            file.write_text(json.dumps(saved))
        costs = dict(bits_per_weight=facts["bits_per_weight"], quantize_seconds=facts["seconds"], peak_bytes=None)
        outcome = Outcome(peer.label, peer.scheme, **saved["scores"], facts=costs)
        return outcome, dict(grid=facts["grid"], logits_differ_by=saved["differs_by"])

    def _score(self, model: Any, processor: Any) -> dict[str, Any]:
        """Greedy answers and teacher-forced measures."""
        started, task = time.perf_counter(), self.task
        answers = generate_answers(
            model, processor, task.items, batch_size=task.batch_size, max_new_tokens=task.max_new_tokens
        )
        log_probs = answer_log_probs(model, self._batches)
        pairs = zip(task.items, answers, strict=True)
        return dict(
            answers=answers,
            points=[SCORERS[item.scorer](answer, item.answers) for item, answer in pairs],
            nll=answer_nll(log_probs, self._batches).tolist(),
            kl=answer_kl(self._reference, log_probs).tolist(),
            evaluate_seconds=time.perf_counter() - started,
        )


def run_peers(
    names: list[str], task: Task, envs: Path, output: Path, limit: int
) -> tuple[list[Outcome], dict[str, Any], dict[str, str]]:
    """Outcomes, what was checked of each, and why others are missing."""
    samples = output / "samples.safetensors"
    batches, _ = make_batches(task.samples, load_processor(task.model), read_config(task.model))
    write_samples([batch.inputs for batch in batches], samples)
    harness = Harness(task, samples)
    outcomes: list[Outcome] = []
    checks: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in names:
        peer, folder = PEERS[name], output / name
        try:
            quantize_with(peer, task, samples, envs, folder, limit)
            outcome, checks[peer.label] = harness.outcome(peer, folder)
            outcomes.append(outcome)
        except (subprocess.SubprocessError, ValueError) as error:
            missing[peer.label] = reason(error, folder.with_suffix(".log"))
        print("made", name, checks.get(peer.label) or missing[peer.label], file=sys.stderr, flush=True)
    return outcomes, checks, missing


def reason(error: Exception, log: Path) -> str:
    """Why a peer is missing: the last line it wrote, if it got so far."""
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
    return f"{type(error).__name__}: {last[0] if last and isinstance(error, subprocess.SubprocessError) else error}"


def comparisons(ours: list[Outcome], peers: list[Outcome]) -> list[dict[str, Any]]:
    """Each peer with those of our rows that store about its bits or fewer: by how much ours is better, paired by
    question."""
    found = []
    for peer in peers:
        for own in ours:
            if own.facts and own.facts["bits_per_weight"] <= peer.facts["bits_per_weight"] + SAME_BITS:
                accuracy = difference_interval(own.points, peer.points)
                kl = difference_interval([-value for value in own.kl or ()], [-value for value in peer.kl or ()])
                found.append(dict(peer=peer.label, ours=own.label, accuracy=asdict(accuracy), kl=asdict(kl)))
    return found


def cell(score: Mapping[str, float] | None, digits: int, scale: float = 1, sign: str = "") -> str:
    """mean (low to high)."""
    if score is None:
        return "-"
    mean, low, high = (f"{scale * score[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """What the results' file holds, in Markdown."""
    header = ["scheme", "method", "stored bits", "exact match, %", "KL, nats per token", "NLL, nats per token"]
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in result["rows"]:
        bits = "16" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        values = [bits, cell(row["accuracy"]["average"], 1, 100), cell(row["kl"], 4), cell(row["nll"], 4)]
        yield f"| {' | '.join([row['scheme'] or '-', row['method'], *values])} |"
    yield from ["", "| peer | ours | ours better by, points of exact match | by, KL |", f"|{' --- |' * 4}"]
    for pair in result["comparisons"]:
        gains = [cell(pair["accuracy"], 1, 100, "+"), cell(pair["kl"], 4, 1, "+")]
        yield f"| {' | '.join([pair['peer'], pair['ours'], *gains])} |"
    yield ""
    for label, check in result["peers"].items():
        yield f"{label}: logits differ from those of its own forward pass by {check['logits_differ_by']:.1e}."
    for label, why in result["missing"].items():
        yield f"{label}: left out ({why})."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "quant-experts-peers"
    parser.add_argument("--envs", type=Path, default=default / "envs", help="where environments are made (several GB)")
    parser.add_argument("--output", type=Path, default=default / "output", help="checkpoints and logs")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--ours", default=OURS, help="see `our_row`")
    parser.add_argument("--split", default="tuning")
    parser.add_argument("--limit", type=int, default=280)
    parser.add_argument("--seconds", type=int, default=1800, help="a peer that takes longer is left out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    envs, output = arguments.envs.resolve(), arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    task = open_task("demo", sample_limit=SAMPLES, question_limit=arguments.limit, split=arguments.split, device="cpu")
    contenders = [our_row(name) for name in arguments.ours.split(",")]
    bench = Bench(task, output / "ours", 1 + len(contenders), lambda *_: None)
    outcomes = [bench.full_precision()]
    for contender in contenders:
        outcomes.append(bench.outcome(contender))
        print("made", contender.label, file=sys.stderr, flush=True)
    found, checks, missing = run_peers(arguments.peers.split(","), task, envs, output, arguments.seconds)
    rows = sorted(table(task.items, outcomes + found), key=lambda row: (row.scheme, row.bits_per_weight or 0))
    result = dict(
        questions=len(task.items),
        split=arguments.split,
        samples=SAMPLES,
        rows=[asdict(row) for row in rows],
        comparisons=comparisons(outcomes, found),
        peers=checks,
        missing=missing,
        versions=library_versions(),
    )
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(result)))


if __name__ == "__main__":
    main()
