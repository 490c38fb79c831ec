"""Tokenizers that come in other files than a tokenizer.json, rebuilt as one: one file a kind."""
