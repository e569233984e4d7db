"""Scaling laws from eval logs: tables in; laws, multipliers with intervals, figures and a report out.

NumPy and SciPy only (Matplotlib inside `figures`, imported when a figure is drawn); never JAX, and nothing
of the rest of the package but its errors and progress bar, so that `ecg-jax fit` runs on a laptop on
anyone's table.

`fit.fit` is the whole path. Below it: `table` reads, `laws` and `solve` fit, `bootstrap` and `intervals`
say how sure one may be, `identify` decides whether there is a law to speak of, `multipliers` compares
families, `figures` and `report` show.
"""
