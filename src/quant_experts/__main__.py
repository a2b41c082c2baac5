"""The program `quant-experts`, and `python -m quant_experts`."""

import sys

from quant_experts.errors import INTERRUPTED


def main() -> None:
    """Entry point. The commands' modules take a while to be imported, and Ctrl-C ends that without a traceback too."""
    try:
        from quant_experts.cli.entry import main as run
    except KeyboardInterrupt:
        print("Interrupted before anything had begun.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
