"""Hygiene step: which documents training leaves out, written beside the raw text, which stays as it is."""
