"""Train the demo's models: ``python -m quant_experts.demo.train --out DIR [--architecture internvl]``.

The learning rate is held after its warm-up and falls to zero in the last part of the time budget, so that a run can be
cut into several calls, and a budget changed under way, without a schedule to redo.
"""

import argparse
import json
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from quant_experts.demo.architecture import ARCHITECTURES, DEFAULT, build_model, build_tokenizer, save
from quant_experts.demo.channels import spread_channels
from quant_experts.demo.forward import TrainingForward
from quant_experts.demo.measure import exact_match, rounded
from quant_experts.demo.questions import KINDS, SEEDS
from quant_experts.demo.stream import IGNORED, Batch, Stream, batch_of
from quant_experts.demo.warm_start import Teacher, adopt_language, as_trained, record_of, relative_distance

STATE = "state.pt"


@dataclass
class Progress:
    """How far a run is; ``seconds`` is training time over all calls."""

    steps: int = 0
    samples: int = 0
    rendered_batches: int = 0
    seconds: float = 0.0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m quant_experts.demo.train",
        description="Train a demo vision-language model on questions rendered while it trains.",
        epilog="Example: train for half an hour in calls of ten minutes, each going on where the last one stopped:\n"
        "  python -m quant_experts.demo.train --out demo-run --budget 1800 --call 600\n"
        "DIR then holds the model (loads with transformers), training.json and, for the next call, state.pt.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output; a run found in it goes on")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default=DEFAULT, help=f"model family ({DEFAULT})")
    parser.add_argument("--init-from", type=Path, metavar="DIR", help="begin a new run from this folder's weights")
    parser.add_argument(
        "--language-from", type=Path, metavar="DIR", help="begin a new run with the language model of this folder"
    )
    parser.add_argument(
        "--imitate",
        type=float,
        default=0.0,
        metavar="S",
        help="learn the image tokens of --language-from's model for S seconds (0), and read them, fading, from S/2 on",
    )
    parser.add_argument(
        "--first-batch", type=int, default=0, help="batch of the train split that a new run begins at (0)"
    )
    parser.add_argument("--budget", type=float, default=1800, metavar="S", help="training seconds in all (1800)")
    parser.add_argument("--call", type=float, default=float("inf"), metavar="S", help="stop this call after S seconds")
    parser.add_argument("--decay", type=float, default=0.35, help="last share of the budget: the rate falls (0.35)")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate of AdamW (1.2e-3)")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="weight decay of AdamW (0)")
    parser.add_argument("--warmup", type=int, default=1000, metavar="STEPS", help="steps of rising rate (1000)")
    parser.add_argument("--turns", type=int, default=128, help="questions of each kind in a batch (128)")
    parser.add_argument("--workers", type=int, default=15, help="rendering processes (15)")
    parser.add_argument(
        "--measure-every", type=int, default=2000, metavar="N", help="steps between measurements (2000)"
    )
    parser.add_argument(
        "--no-compile", dest="compiled", action="store_false", help="run blocks as they are, also on a GPU"
    )
    parser.add_argument(
        "--keep-every", type=float, default=120, metavar="S", help="write the run every S seconds (120)"
    )
    parser.add_argument("--measure-turns", type=int, default=300, help="tuning questions of each kind at the end (300)")
    parser.add_argument("--spread", type=float, default=0.3, help="unevenness of the stored model's channels (0.3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first weights (0)")
    return parser.parse_args()


def rate_at(progress: Progress, options: argparse.Namespace) -> float:
    """The learning rate: linear warm-up, constant, linear decay at the end of the time budget."""
    left = max(0.0, 1 - progress.seconds / options.budget)
    return float(options.rate * min(1.0, (progress.steps + 1) / options.warmup, left / options.decay))


def imitation_at(progress: Progress, options: argparse.Namespace) -> float:
    """The teacher's share: one for half of the ``imitate`` seconds, then falling to zero."""
    return min(1.0, max(0.0, 2 - 2 * progress.seconds / options.imitate)) if options.imitate else 0.0


def teacher_of(progress: Progress, options: argparse.Namespace, device: torch.device) -> Teacher | None:
    """The model to imitate, while there is one."""
    if imitation_at(progress, options) == 0.0:
        return None
    if options.language_from is None:
        raise SystemExit("--imitate needs --language-from: the image tokens to imitate are those of that model.")
    return Teacher(as_trained(options.language_from).to(device), compiled=options.compiled and device.type == "cuda")


def measured(model: Any, batches: list[Batch]) -> dict[str, dict[str, float]]:
    """Exact match on the tuning split, of weights as they will be stored: full precision, W4A6, W4A4."""
    stored = {name: value.to(torch.bfloat16).float() for name, value in model.state_dict().items()}
    copy = type(model)(model.config)
    copy.to(batches[0].tokens.device).eval()
    copy.load_state_dict(stored)
    models = {"full": copy, "rtn_w4a6": rounded(copy, 6), "rtn_w4a4": rounded(copy, 4)}
    scores = {name: exact_match(one, batches) for name, one in models.items()}
    for name, row in scores.items():
        print(f"  {name:9s} " + " ".join(f"{kind} {score:.1f}" for kind, score in row.items()), flush=True)
    return scores


def uneven(model: Any, options: argparse.Namespace) -> Any:
    """The model as it is stored and measured: the same function, with channels as uneven as large models' are."""
    shipped = deepcopy(model)
    spread_channels(shipped, options.spread, options.seed)
    return shipped


def record(progress: Progress, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What `training.json` says of the run."""
    names = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "command": "python -m quant_experts.demo.train " + " ".join(sys.argv[1:]),
        "architecture": options.architecture,
        "rate": options.rate,
        "weight_decay": options.weight_decay,
        "batch": options.turns * len(KINDS),
        "budget_seconds": options.budget,
        "decay_share": options.decay,
        "seed_of_weights": options.seed,
        "channel_spread": options.spread,
        "seeds_of_questions": SEEDS,
        "device": names,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "measured_on": f"{options.measure_turns} questions of each kind of the tuning split, percent exact match",
        "warm_start": warm_start(options),
        **asdict(progress),
        "before": record_of(options.init_from) if options.init_from else None,
    }


def warm_start(options: argparse.Namespace) -> str | None:
    """In words, what the run began with of another architecture's model."""
    if options.language_from is None:
        return None
    began = "the language model (embeddings, decoder blocks, head) began as that of --language-from's model"
    copied = (
        f"; for {options.imitate:.0f} s the tower and projector learned that model's image tokens, in the first half "
        "alone, in the second with the language model reading a mixture of both that fades to the tower's own"
    )
    return began + (copied if options.imitate else "")


def keep(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    options: argparse.Namespace,
) -> None:
    """Write the model, the record and the state that the next call goes on from."""
    device = next(model.parameters()).device
    save(uneven(model, options), tokenizer, options.out)
    (options.out / "training.json").write_text(json.dumps(record(progress, options, device), indent=2) + "\n")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, options.out / STATE)


def start(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> tuple[Any, Progress, dict[str, Any] | None]:
    """The model to train, the progress so far, and the optimizer's state if a run goes on."""
    model = build_model(tokenizer, options.seed, options.architecture)
    if (options.out / STATE).exists():
        state = torch.load(options.out / STATE, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        return model, Progress(**state["progress"]), state["optimizer"]
    if options.init_from is not None:
        model.load_state_dict(as_trained(options.init_from).state_dict())
    if options.language_from is not None:
        adopt_language(model, as_trained(options.language_from))
    return model, Progress(rendered_batches=options.first_batch), None


class Log:
    """Prints loss and speed now and then."""

    def __init__(self, stream: Stream, progress: Progress) -> None:
        self._stream, self._progress = stream, progress
        self._began, self._samples = time.monotonic(), progress.samples

    def line(self, loss: Tensor) -> None:
        """One line for the steps since the last one."""
        value, now, progress = loss.item(), time.monotonic(), self._progress
        speed = (progress.samples - self._samples) / (now - self._began)
        share = self._stream.fresh / (self._stream.fresh + self._stream.replayed)
        done = f"{progress.steps} {progress.seconds:.0f}s"
        print(f"{done} loss {value:.4f} {speed:.0f}/s fresh {share:.2f}", flush=True)
        self._began, self._samples = now, progress.samples


def step(
    forward: TrainingForward, optimizer: torch.optim.Optimizer, batch: Batch, teacher: Teacher | None, share: float
) -> Tensor:
    """Train on one batch; its loss.

    The tower learns the teacher's image tokens with weight ``share``; the language model reads that share of them and
    the rest of the tower's own, or nothing at all while the share is one.
    """
    device = batch.tokens.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):  # a CPU is faster without
        features = forward.image_features(batch.images)
        if teacher and share > 0:
            wanted = teacher.image_features(batch.images)
            loss = share * relative_distance(features, wanted)
            if share < 1:
                loss = loss + answer_loss(forward, batch, torch.lerp(features, wanted, share))
        else:
            loss = answer_loss(forward, batch, features)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(forward.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def answer_loss(forward: TrainingForward, batch: Batch, features: Tensor) -> Tensor:
    """Cross entropy per answer token, with these image tokens."""
    logits = forward.logits(batch.tokens, features).flatten(0, 1).float()
    return functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)


def train(options: argparse.Namespace) -> None:
    """Run one call of the training."""
    call_began = time.monotonic()
    tokenizer = build_tokenizer(options.architecture)
    model, progress, optimizer_state = start(options, tokenizer)
    stream = Stream(build_tokenizer(), turns=options.turns, workers=options.workers, first=progress.rendered_batches)
    tuning = batch_of(build_tokenizer(), "tuning", 0, options.measure_turns)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    model.to(device).train()
    teacher = teacher_of(progress, options, device)
    if teacher and optimizer_state is None:
        # As many pictures as in training: other shapes would compile the teacher again.
        teacher.prepare(
            TrainingForward(model), batch_of(build_tokenizer(), "train", 0, options.turns).images.to(device)
        )
    forward = TrainingForward(model, compiled=options.compiled and device.type == "cuda")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=options.weight_decay, fused=True
    )
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    asked, log = [tuning.to(device)], Log(stream, progress)
    earlier, rendered, loop_began = progress.seconds, progress.rendered_batches, time.monotonic()
    kept = loop_began
    for batch in stream.batches(device):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, options)
        loss = step(forward, optimizer, batch, teacher, imitation_at(progress, options))
        progress.steps += 1
        progress.samples += len(batch.tokens)
        progress.rendered_batches = rendered + stream.fresh
        if progress.steps % 200 == 0:
            log.line(loss)
        if progress.steps % options.measure_every == 0:
            progress.scores = measured(uneven(model, options), asked)
        progress.seconds = earlier + time.monotonic() - loop_began
        if time.monotonic() - kept >= options.keep_every:
            keep(model, tokenizer, optimizer, progress, options)
            kept = time.monotonic()
        if progress.seconds >= options.budget or time.monotonic() - call_began >= options.call:
            break
    stream.close()
    progress.scores = measured(uneven(model, options), asked)
    keep(model, tokenizer, optimizer, progress, options)


if __name__ == "__main__":
    train(arguments())
