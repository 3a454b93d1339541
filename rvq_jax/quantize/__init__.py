"""The quantizer: gradients, search, codebook (paper 3.2 and 3.4)."""
