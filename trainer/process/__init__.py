"""Process supervision of a run: limits, failures, signals and restarts."""
