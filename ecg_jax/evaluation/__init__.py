"""From a trained encoder to rows of the eval log: features, probes, metrics with intervals, paired
differences.

`metrics`, `bootstrap`, `compare`, `evalog`, `scoring` and `tasks` are NumPy and SciPy only; `features`,
`linear` and `probe` use JAX.
"""
