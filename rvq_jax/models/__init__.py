"""Encoder, decoder and the whole VQ-VAE (paper 3.1 and 3.3)."""
