"""Facts of model architectures that need no torch: configurations, key names, ties, profiles."""
