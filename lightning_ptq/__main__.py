"""`python -m lightning_ptq`, and what `lightning-ptq` calls."""

import os
import sys

from lightning_ptq.help import NO_READER, program_help


def main() -> None:
    """Run the command line; its overview, and Ctrl+C, do not wait for the seconds in which torch is imported."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        try:
            sys.stdout.write(program_help())
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            sys.exit(NO_READER)
        return
    try:
        from lightning_ptq.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
