"""ecg_jax: scaling studies of electrocardiogram models in JAX.

Importing the package imports nothing heavy: no JAX, no TensorFlow. Each stage is a sub-package of its own. `load` gives
the encoder of a run for one's own recordings:

    import ecg_jax
    features = ecg_jax.load("runs/R4").embed(signal, rate=500, leads=["I", "II", ...], unit="mV")
"""

__version__ = "0.1.0"


def load(run):
    """The encoder of the run folder `run` (`evaluation.embed.Embedder`). Raises DataError where there is none."""
    from ecg_jax.evaluation.embed import Embedder

    return Embedder(run)
