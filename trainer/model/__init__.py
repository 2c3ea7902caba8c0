"""The model: `hybrid.py` is the file to read first; each kind of sublayer has a file of its own."""
