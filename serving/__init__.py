"""Runs verified adapters on base models: the one engine that evaluation and production share."""
