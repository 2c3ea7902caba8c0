"""Where a run's numbers go besides its own files: TensorBoard's files, Weights & Biases, MLflow, Langfuse."""
