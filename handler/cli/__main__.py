"""`python -m handler.cli`: the same as `tartan`, without installing."""

from handler.cli import main

main()
