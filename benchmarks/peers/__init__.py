"""opsin against other engines, at equal bits, on one synthetic checkpoint: ``make bench-peers``.

In the order of reading: `catalogue` (who is compared), `environments` and `exports` (what that needs),
`turns` and `child` (measuring), `engines`, `store`, `floors`, `table` and `chart` (results).
Run from benchmarks/ as ``python -m peers``.
"""
