"""Tokens from disk to batches: manifests, Megatron shards, tokenizer, mixing plan, loader."""
