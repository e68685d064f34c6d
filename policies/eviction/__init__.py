"""Eviction: which reusable KV block goes when room is needed."""
