"""Checkpoints of a run: their files, their tensors, and from which of them a run may continue."""
