"""`python -m treadle.health HOST:PORT`: one look at a service, as a container's health check takes it."""
