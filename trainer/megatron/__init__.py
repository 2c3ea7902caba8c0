"""Training by Megatron-LM (train.engine megatron): from the same spec, shards and process contract as our own loop."""
