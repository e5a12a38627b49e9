"""`python -m semel` is the `semel` command."""

from semel.ops.cli import main

if __name__ == "__main__":
    main()
