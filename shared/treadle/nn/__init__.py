"""Model architectures in torch."""
