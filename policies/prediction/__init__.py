"""Prediction: how long an output will be, foreseen on arrival."""
