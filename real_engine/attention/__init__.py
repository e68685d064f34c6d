"""Attention over the paged KV cache: one interface, one module a backend. Data plane; request path."""
