"""Parameters, operations and memory of a model, by arithmetic. Imports no torch."""
