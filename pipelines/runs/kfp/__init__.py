"""Runs on Kubeflow Pipelines: requests (backend), steps out of a workflow (workflow), their logs (steplog), a run."""
