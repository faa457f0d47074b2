"""`python -m kbitc` is the command line."""

from kbitc.cli import main

if __name__ == "__main__":
    main()
