"""Prompts in, batches out; the only place that knows which position predicts which token."""
