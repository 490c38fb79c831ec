"""What the engine does otherwise on CUDA."""
