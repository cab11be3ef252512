"""The HTTP service over a backend: edits, jobs, adapters, health, and the page."""
