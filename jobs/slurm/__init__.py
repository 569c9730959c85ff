"""What Retort says to SLURM and what it makes of the answers."""
