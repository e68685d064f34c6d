"""Cost models: how long a step would take."""
