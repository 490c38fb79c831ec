"""The trainer service; its contract stands, its jobs do not run yet."""
