"""`python -m dngd.cli`."""

from dngd.cli import main

main()
