"""A page to look at a tokenizer: images, reconstructions, tokens, codes."""
