"""Preemption: who gives up KV blocks when they run short, and whether that KV is dropped or parked."""
