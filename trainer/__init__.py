"""Making adapters: from a recipe to a trained, evaluated LoRA adapter that the registry can sign.

Importing this package is light; torch, diffusers and the rest are imported by the functions that need them.
"""
