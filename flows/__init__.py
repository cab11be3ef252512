"""Orchestration: Prefect flows that decorate plain functions of the floors below; no logic of their own."""
