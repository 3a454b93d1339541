"""Measuring a tokenizer: metrics of a split, perceptual ones, figures."""
