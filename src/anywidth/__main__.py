"""`python -m anywidth` is the command line."""

from anywidth.cli import main

main()
