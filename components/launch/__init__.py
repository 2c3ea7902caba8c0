"""Start the trainer, on this machine or as a job on a cluster, and verify its artefacts."""
