"""From a trained encoder to rows of the eval log: features, probes, metrics with intervals, paired differences, tables.

`metrics`, `influence`, `bootstrap`, `calibration`, `compare`, `evalog`, `openings`, `report`, `scoring` and `tasks` are
NumPy and SciPy only; `features`, `sources`, `linear`, `logistic`, `probe` and `embed` use JAX.
"""
