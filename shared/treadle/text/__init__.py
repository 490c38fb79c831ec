"""Text without torch or gRPC: tokenizers, decoding as tokens arrive, stop strings, chat templates."""
