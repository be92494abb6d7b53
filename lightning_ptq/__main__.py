"""`python -m lightning_ptq`, and what `lightning-ptq` calls."""

import sys

from lightning_ptq.help import program_help


def main() -> None:
    """Run the command line; its overview, and Ctrl+C, do not wait for the seconds in which torch is imported."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        sys.stdout.write(program_help())
        return
    try:
        from lightning_ptq.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
