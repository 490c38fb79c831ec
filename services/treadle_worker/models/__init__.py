"""Which models this worker has, and each of them from what is wanted to its end."""
