"""Peak memory of quantizing a random 24-block checkpoint of 1.5 GB on this CPU.

Prints the peak resident memory above what the interpreter holds once everything is imported, next to the estimate made
before the start, and writes benchmarks/results/streaming_memory.json.

    python benchmarks/streaming_memory.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from random_models import text_config, write_random_model

CHILD = """
import json, random, sys
import torch, transformers, quant_experts
from quant_experts.calibration.memory import resident_bytes
from quant_experts.config import QuantizationConfig
from quant_experts.pipeline import quantize
before = resident_bytes("VmRSS")
source, output, scheme, recipe, samples, tokens = sys.argv[1:]
letters = random.Random(0)
texts = ["".join(letters.choices("abcdefgh ", k=int(tokens))) for _ in range(int(samples))]
result = quantize(source, [(None, f"{i}", text) for i, text in enumerate(texts)], output,
                  QuantizationConfig.of(scheme, recipe), device="cpu")
print(json.dumps(dict(above_interpreter=resident_bytes("VmHWM") - before, interpreter=before,
                      estimate=result.estimated_bytes, seconds=result.seconds, tokens=result.tokens)))
"""


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, one token a character: enough to feed random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each sample, nearly")
    parser.add_argument("--scheme", default="W4A6")
    parser.add_argument("--recipe", default="paper")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        size = write_random_model(source, text_config(arguments.hidden, arguments.intermediate, arguments.blocks))
        write_tokenizer(source)
        settings = [arguments.scheme, arguments.recipe, str(arguments.samples), str(arguments.tokens)]
        command = [sys.executable, "-c", CHILD, str(source), str(Path(scratch) / "out"), *settings]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(child.stdout.splitlines()[-1]) | {"checkpoint_bytes": size, "arguments": vars(arguments)}
    print(json.dumps(result, indent=1))
    print(
        f"checkpoint {size / 1e6:,.0f} MB, peak {result['above_interpreter'] / 1e6:,.0f} MB above the interpreter's "
        f"{result['interpreter'] / 1e6:,.0f} MB (estimate {result['estimate'] / 1e6:,.0f} MB), "
        f"{result['seconds']:.0f} s"
    )
    out = Path(__file__).parent / "results" / "streaming_memory.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
