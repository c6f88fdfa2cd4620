"""Text in: sources, tokenizer, rows, masks."""
