"""The inference worker: an I/O process that claims requests, and an engine process that runs them."""
