"""What the benchmarks share: engines as processes, turns and medians, rows with targets, models, prompts."""
