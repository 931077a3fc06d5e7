"""`python -m dq_lightning` is the console script, so that `torchrun -m dq_lightning` starts it as well."""

from dq_lightning.cli import main

if __name__ == "__main__":
    main()
