"""The subcommands of `ecg-jax`: arguments in, one call of a stage, its result shown. Each imports only its stage."""
