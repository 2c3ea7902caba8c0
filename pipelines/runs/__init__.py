"""Runs on this machine, on a cluster and on Kubeflow Pipelines; find.py finds the one that a name means."""
