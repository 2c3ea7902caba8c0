"""One model on several ranks: who holds which part, how experts exchange tokens, how gradients are summed.

`layout` imports no torch: what a ParallelSpec means can be checked where nothing is allocated.
"""
