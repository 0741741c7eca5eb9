"""What surrounds training: processes, run directories, checkpoints on disk, tracking."""
