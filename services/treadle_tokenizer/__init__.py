"""The tokenizer service: text to ids and back, counting, chat templates."""
