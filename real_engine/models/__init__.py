"""Llama-family decoders: configuration, weights, tokenizer and the forward pass. Data plane; state path."""
