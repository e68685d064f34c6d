"""Admission: whether a request enters at all."""
