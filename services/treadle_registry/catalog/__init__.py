"""What the registry remembers, in one database that it alone writes: a file a table."""
