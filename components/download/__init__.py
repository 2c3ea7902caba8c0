"""Download step: raw text from files, URLs or the Hugging Face Hub into JSON lines."""
