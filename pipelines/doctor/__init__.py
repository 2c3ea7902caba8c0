"""`yaongi doctor`: what this machine and a cluster have and lack for a run, found out by trying, and what to do."""
