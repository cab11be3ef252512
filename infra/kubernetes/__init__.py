"""Manifests of the platform for Kubernetes, and the secrets of a cluster on a laptop."""
