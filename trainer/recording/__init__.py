"""What a run writes about itself: log lines, metrics.jsonl, TensorBoard, Prometheus, result files."""
