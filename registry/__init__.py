"""The signed adapter registry: manifests, statements, scanning and admission.

This package starts in a blink: it imports nothing by itself. Import the module that you need, for example
``from registry.admission import admit``.
"""
