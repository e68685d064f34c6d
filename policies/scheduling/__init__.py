"""Scheduling: who gets how many tokens of the next step."""
