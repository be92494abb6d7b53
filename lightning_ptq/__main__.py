"""`python -m lightning_ptq`: the same as `lightning-ptq`."""

from lightning_ptq.cli import main

if __name__ == "__main__":
    main()
