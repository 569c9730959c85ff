"""Runs on Ray: by the address of a cluster, or as a RayJob on Kubernetes."""
