"""A cluster as the API server shows it: its client, what is watched, and what the state of its objects says."""
