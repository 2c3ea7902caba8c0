"""The records of a run: log lines, metrics.jsonl, TensorBoard, Prometheus, result files."""
