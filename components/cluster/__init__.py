"""A cluster as its API server shows it: the client, the watchers and the state of its objects."""
