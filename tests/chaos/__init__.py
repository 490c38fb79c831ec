"""What the suite promises when things die: real processes, real kills."""
