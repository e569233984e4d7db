"""From a raw recording to a clean one: leads, units, filter, resampling, cutting, quality, R peaks.

NumPy, SciPy and wfdb only: neither JAX nor TensorFlow nor any other part of the package is imported here.
"""
