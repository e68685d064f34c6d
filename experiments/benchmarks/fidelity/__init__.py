"""How far the simulator's numbers are from measured ones: our own engine, a real vLLM run, measured kernels.

python -m experiments.benchmarks.fidelity                     what is deterministic: run, kernels, ablations
python -m experiments.benchmarks.fidelity own dir=DIR         measure our own engine and predict it (see own.py)
python -m experiments.benchmarks.fidelity --check             fails where an error has grown by more than its noise
python -m experiments.benchmarks.fidelity --record            keep the errors as the baseline
"""
