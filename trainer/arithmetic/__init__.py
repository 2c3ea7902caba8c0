"""What a model amounts to, by arithmetic alone: parameters, operations, memory. Imports no torch."""
