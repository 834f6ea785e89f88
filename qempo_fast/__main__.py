"""python -m qempo_fast."""

from qempo_fast.cli import main

main()
