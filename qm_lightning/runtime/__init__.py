"""What surrounds a training: sizes from the launcher, the run directory, checkpoints, loggers."""
