"""Generation of text: caches, sampling, and an engine that continues many texts at once."""
