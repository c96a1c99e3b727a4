"""`python -m cptain`, for machines where the console script is not on PATH."""

from cptain.cli import main

main()
