"""`yaongi dual`, for two GPUs without Kubernetes: its flags become a job, which it starts as `yaongi local` does."""
