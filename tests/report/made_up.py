"""A comparison with realistic figures, none of them measured."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from quant_experts.artifacts import Event, GroupRecord
from quant_experts.evaluation.comparison import FULL_PRECISION, AnswerExample, Comparison, MethodRow, Score

METHODS = {  # method -> (share of full precision's accuracy kept, stored bits, seconds, error over that of rtn)
    "rtn": (0.86, 4.02, 3.1, 1.0),
    "smoothquant": (0.85, 4.03, 4.4, 0.8),
    "gptq": (0.965, 4.06, 31.0, 0.25),
    "mbq": (0.91, 4.03, 190.0, 0.6),
    "aser": (0.955, 4.52, 25.0, 0.31),
    "paper": (0.95, 8.87, 312.0, 0.39),
    "quant-experts": (0.99, 4.57, 94.0, 0.126),
}
KINDS = ("text", "reading", "counting", "color", "position", "chart", "document")
TYPES = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (448, 320)),
    (("self_attn.o_proj",), (320, 320)),
    (("mlp.gate_proj", "mlp.up_proj"), (1792, 320)),
    (("mlp.down_proj",), (320, 896)),
)


def score(mean: float, half: float) -> Score:
    return Score(mean, mean - half, mean + half)


def rows(schemes: tuple[str, ...] = ("W4A6",), methods: tuple[str, ...] = tuple(METHODS)) -> tuple[MethodRow, ...]:
    full = {kind: score(0.93 - 0.02 * i, 0.03) for i, kind in enumerate(KINDS)}
    result = [MethodRow(FULL_PRECISION, "", {"average": score(0.874, 0.012), **full}, Score(0.1321, 0.1204, 0.1448))]
    for loss, scheme in enumerate(schemes):
        for method in methods:
            kept, bits, seconds, error = METHODS[method]
            kept = 1 - (1 - kept) / (1 + loss)
            accuracy = {"average": score(0.874 * kept, 0.013)}
            accuracy |= {kind: score(full[kind].mean * kept, 0.034) for kind in KINDS}
            kl = 0.21 * error / (1 + loss)
            result.append(
                MethodRow(
                    method,
                    scheme,
                    accuracy,
                    score(0.132 + kl, 0.011),
                    score(kl, 0.1 * kl),
                    bits - (1 if scheme.startswith("W3") else 0),
                    seconds,
                    int(4.1e8 + 1e7 * seconds),
                    12.5,
                    layer_error=error,
                    oracle_layer_error=0.8 * error if method == "paper" else None,
                    base_flops=18_000_000,
                    repair_flops=int(1.2e6 * (bits - 4)),
                    token_bytes=int(9e6 * min(bits, 5.2) / 8),
                    over_rtn={"accuracy": score(0.874 * (kept - 0.86), 0.01)} if method != "rtn" else {},
                )
            )
    return tuple(result)


def similar(rng: random.Random) -> dict[str, list]:  # type: ignore[type-arg]
    """Thirty channels in five clusters."""
    clusters = [channel // 6 for channel in range(30)]
    half = {
        (i, j): rng.randrange(35, 80) if clusters[i] == clusters[j] else rng.randrange(25)
        for i in range(30)
        for j in range(i)
    }
    shares = [[100 if i == j else half[max(i, j), min(i, j)] for j in range(30)] for i in range(30)]
    return {"similarity": shares, "clusters": clusters}


def records(factor: float, blocks: int = 12, routed: bool = True, image: bool = True) -> tuple[GroupRecord, ...]:
    rng = random.Random(f"{factor} {blocks}")
    kinds = ("text", "image", "answer") if image else ("text", "answer")
    result = []
    for block in range(blocks):
        for index, (linears, shape) in enumerate(TYPES):
            plain = 0.06 * (1 + 2 * (index == 3)) * (1 + 0.8 * math.sin(block / blocks * 6)) * rng.uniform(0.7, 1.4)
            use, places = {}, {}
            for kind in kinds if routed else ():
                lean = {"text": 0.3, "image": 1.0, "answer": 0.5}[kind]
                weights = [rng.gammavariate(1 + 3 * abs(math.sin(e * 2.1 + block + 2 * lean)), 1.0) for e in range(8)]
                use[kind] = [w / sum(weights) for w in weights]
                seen = [(kind == "image") == (2 < part < 12) for part in range(16)]
                places[kind] = [[round(90 * w * rng.uniform(0.5, 1.5)) * there for there in seen] for w in use[kind]]
            curve = [max(0.0, min(1.0, 1.1 / (1 + (c / 30) ** 2.2))) for c in range(shape[1])]
            frequency = {"all": curve}
            for kind in kinds:
                frequency[kind] = [min(1.0, max(0.0, share * rng.uniform(0.3, 1.5))) for share in curve]
            result.append(
                GroupRecord(
                    linears=tuple(f"model.language_model.layers.{block}.{linear}" for linear in linears),
                    tokens=20480,
                    shape=shape,
                    stored_bits=int(4.57 * shape[0] * shape[1]),
                    weights=shape[0] * shape[1],
                    error={"all": plain * factor, **{k: plain * factor * (1 + 0.3 * i) for i, k in enumerate(kinds)}},
                    rtn_error={"all": plain, **{k: plain * (1 + 0.3 * i) for i, k in enumerate(kinds)}},
                    channel_frequency=frequency,
                    expert_use=use,
                    expert_positions=places,
                    **(similar(rng) if routed else {}),
                    important_tokens={
                        kind: [
                            sorted({min(rng.randrange(160), rng.randrange(160)) for _ in range(24)}) for _ in range(30)
                        ]
                        for kind in kinds
                    },
                )
            )
    return tuple(result)


def picture(text: str, background: str = "#fdf6e3") -> Image.Image:
    image = Image.new("RGB", (280, 168), background)
    draw = ImageDraw.Draw(image)
    draw.rectangle((12, 12, 268, 156), outline="#333333", width=3)
    draw.text((40, 70), text, fill="black")
    return image


def answers() -> tuple[AnswerExample, ...]:
    questions = (
        ("What is written in the image?", "7KQ2-ZX91-PLM4", "7KQ2-ZX91-PLN4"),
        ("How many red circles are there?", "7", "6"),
        ("Which bar is the tallest? Answer with its label.", "March", "March."),
        ("What is the total on the invoice?", "1,204.50", ""),
    )
    return tuple(
        AnswerExample(
            question,
            reference,
            picture(reference) if index != 2 else None,
            {FULL_PRECISION: reference, "rtn W4A6": wrong, "quant-experts W4A6": reference},
        )
        for index, (question, reference, wrong) in enumerate(questions)
    )


def comparison(schemes: tuple[str, ...] = ("W4A6",), blocks: int = 12, image: bool = True) -> Comparison:
    found = rows(schemes)
    layers = {
        f"{row.method} {row.scheme}": records(
            METHODS[row.method][3] * (1.0 if row.scheme == "W4A6" else 0.5),
            blocks,
            routed=row.method in ("paper", "quant-experts"),
            image=image,
        )
        for row in found[1:]
    }
    return Comparison(
        title="Seven ways to quantize the demo model",
        model="quant-experts demo VLM (Qwen2-VL architecture, 16M parameters)",
        command="quant-experts compare --model demo --schemes W4A6 --questions 3500 --seed 2",
        questions=3500,
        rows=found,
        layers=layers,
        answers=answers(),
        events={
            "paper W4A6": tuple(
                Event(f"model.language_model.layers.{i}.mlp.down_proj", "NPMI was undefined and taken as 0")
                for i in range(5)
            ),
            "gptq W4A6": (Event("model.language_model.layers.3.self_attn.o_proj", "damping raised to 0.05"),),
        },
        versions={
            "machine": "NVIDIA H200, 16 cores, 128 GiB",
            "quant-experts": "0.1.0",
            "torch": "2.11.0",
            "transformers": "5.17.0",
        },
    )
