"""A program that knows vLLM only: loads checkpoints and answers prompts.

Arguments: a JSON file with a list of jobs {"folder", "prompts": [[text, path of an image or null], ...], "tokens": how
many, "options" of `LLM`}, and one to write to: for each job {"tokens", "logprobs"} with a list for each prompt and
{"operations"}, how many layers ran as an operation of a compiled model; or {"error"}.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

for name, value in dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0").items():
    os.environ.setdefault(name, value)

from PIL import Image  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def answer(folder: str, prompts: list[tuple[str, str | None]], tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    limits = {"limit_mm_per_prompt": {"image": 1, "video": 0}} if any(image for _, image in prompts) else {}
    model = LLM(folder, **{"dtype": "float32", "max_model_len": 512, "max_num_seqs": 2} | limits | options)
    inputs = [
        {"prompt": text} | ({"multi_modal_data": {"image": Image.open(image).convert("RGB")}} if image else {})
        for text, image in prompts
    ]
    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5)
    operations = count_operations()
    outputs = [result.outputs[0] for result in model.generate(inputs, settings, use_tqdm=False)]
    return dict(
        tokens=[list(output.token_ids) for output in outputs],
        logprobs=[[{key: value.logprob for key, value in step.items()} for step in o.logprobs] for o in outputs],
        operations=len(operations),
    )


def count_operations() -> list[str]:
    """An operation of a compiled model looks its layer up: what is looked up from now on."""
    engine, found = sys.modules["quant_experts.runtime.vllm.engine"], []
    look_up = engine.get_forward_context
    engine.get_forward_context = lambda: found.append("layer") or look_up()
    return found


def main(jobs: Path, output: Path) -> None:
    results: list[dict[str, Any]] = []
    for job in json.loads(jobs.read_text()):
        try:
            results.append(answer(**job))
        except Exception as error:
            results.append(dict(error=f"{type(error).__name__}: {error}"))
        gc.collect()
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
