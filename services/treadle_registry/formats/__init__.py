"""How a model's files are read, and the canonical form that is written of all of them."""
