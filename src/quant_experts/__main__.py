"""`python -m quant_experts`."""

from quant_experts.cli.entry import main

if __name__ == "__main__":
    main()
