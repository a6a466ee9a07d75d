"""``python -m opsin`` is ``opsin``."""

from opsin.cli import main

main()
