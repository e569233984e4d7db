"""ecg_jax: scaling studies of electrocardiogram models in JAX.

Importing the package imports nothing heavy: no JAX, no TensorFlow. Each stage is a sub-package of its own.
"""

__version__ = "0.1.0"
