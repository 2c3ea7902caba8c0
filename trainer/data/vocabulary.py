"""The fixed part of every vocabulary. Imports nothing, so that a job can be checked without tokenizers."""

from __future__ import annotations

EOD = "<|endoftext|>"
SPECIAL_TOKENS = (
    EOD,
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|think_start|>",
    "<|think_end|>",
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # and the bytes
