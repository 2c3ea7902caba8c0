"""Runs, wherever they are: on this machine, on a cluster, on Kubeflow Pipelines. find.py says which one is meant."""
