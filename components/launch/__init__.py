"""Start the trainer, on this machine or as a job on a cluster, and prove what it left behind."""
