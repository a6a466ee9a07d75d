"""``python -m opsin.rank``: a rank other than the first. Started by the engine only."""

from opsin.rank.worker import main

main()
