"""What computes steps: a device with its share of the weights and of the KV cache, or several as one.

Rank 0 (`local`, or `leader` with other ranks behind it) lives in the engine's process; the others are
processes of their own (``python -m opsin.rank``). What crosses between them is in `step`: numbers.
"""
