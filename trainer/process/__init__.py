"""Care of the processes of a run: what ends them, how, and what may start them again."""
