"""Checkpoints of a run: their files, their tensors, and the choice of the one to resume from."""
