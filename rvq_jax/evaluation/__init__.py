"""Metrics, evaluation, the tokenizer and figures."""
