"""Models as Hugging Face's transformers know them: configurations, names of weights, files."""
