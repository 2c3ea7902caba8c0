"""`yaongi doctor`: test what this machine and a cluster have and lack for a run, and say what to do."""
