"""`python -m dngd`: the command line, where its script is not on the path."""

from dngd.cli import main

if __name__ == "__main__":
    main()
