"""One static HTML page to look at a tokenizer: images, tokens, codes."""
