"""One model on several ranks: sharding, token exchange of experts, gradient reduction.

`layout` imports no torch, so that a ParallelSpec can be checked without allocating anything.
"""
