"""`python -m smidgen`: the command."""

from smidgen.cli import main

main()
