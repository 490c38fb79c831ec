"""What can be asked about texts that are there whole: embed, classify, tag, rerank, score."""
