"""Tensors and bytes: everything a run computes and stores. Knows no scheduler."""
