"""Hygiene step: list the documents that training leaves out, beside the raw text, which does not change."""
