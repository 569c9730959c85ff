"""Recipes, runs and schedulers. Nothing here imports torch when it is imported, so a login node answers at once."""
