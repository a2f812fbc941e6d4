"""Prompts in, batches out; the one place that knows which position predicts which token."""
