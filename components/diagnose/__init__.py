"""Why a job on a cluster does not run, or how it ended, in one sentence with a remedy."""
