"""A program that knows `transformers` only: loads checkpoints, asks them, saves them, loads them again.

Arguments: a JSON file with a list of jobs {"folder", "inputs", "output", "auto"}; writes to each output what came out.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

assert not {"quant_experts.pipeline", "quant_experts.runtime.loading"} & set(sys.modules)


def work(folder: str, inputs: str, output: str, auto: str) -> None:
    cls = getattr(transformers, auto)
    given = load_file(inputs)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(**given).logits

    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    found = {"logits": logits(model)}
    found["tokens"] = model.generate(**given, max_new_tokens=6, do_sample=False)
    model.save_pretrained(f"{output}-saved")
    found["saved"] = logits(cls.from_pretrained(f"{output}-saved", dtype=torch.float32).eval())
    found["placed"] = logits(cls.from_pretrained(folder, dtype=torch.float32, device_map="auto").eval())
    save_file(found, output)


for job in json.loads(Path(sys.argv[1]).read_text()):
    try:
        work(**job)
    except Exception:
        Path(job["output"]).with_suffix(".error").write_text(traceback.format_exc())
