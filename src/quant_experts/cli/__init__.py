"""The `quant-experts` command: parse, call, show. No logic lives here.

Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 interrupted, anything else a bug of ours (with its
traceback).
"""

from quant_experts.cli.entry import app, main

__all__ = ["app", "main"]
