"""`python -m potluck` is the same as `potluck`."""

from potluck.cli.main import main

main()
