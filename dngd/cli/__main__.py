"""`python -m dngd.cli`."""

from dngd.cli.root import main

main()
