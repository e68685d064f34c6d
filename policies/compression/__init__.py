"""Compression: how much of its own KV a request keeps, and which part of it."""
