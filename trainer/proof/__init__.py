"""Proof at the start: what this very machine computes, before a run relies on it.

`auto` takes a kernel only where a record shows that it computes what its reference does (trainer/parity.py). Committed
records cover few GPUs and versions. So where one is missing, the first rank of each node makes it (`at_start`): a child
process runs the comparisons (`child`, `prove`), and the records are kept in a cache directory and beside the run
(`cache`). What crashes, hangs or computes something else is named and passed over.
"""
