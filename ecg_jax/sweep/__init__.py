"""A grid of runs: planned, launched, gone on with after any kill, and tabulated (`ecg-jax sweep`).

`spec` reads the TOML, `grid` turns it into ordered jobs, `cost` says what they will take, `folder` knows which of them
are done, claimed or failed, `work` does one after another, `launch` starts workers here or through Slurm and shows
how far they are. Trains nothing by itself: a job calls what `ecg-jax train`, `tokenize` and `probe` call.

All state is in the sweep's folder. Workers are equals that look there for the next job, so it does not matter who
started them, how many there are, or which of them die.
"""
