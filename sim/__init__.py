"""The simulated data plane: SimPy drives the same control plane, a cost model says how long each step takes."""
