"""LoRA files as people have them: read from any dialect, written in the canonical layout or in any other.

``grammar`` knows how keys are spelled, ``strength`` what alpha means and where it stands, ``reading`` puts
both together and refuses what it cannot map whole, ``writing`` writes tensor by tensor, ``cards`` drafts the
adapter card. The dialects, and what each loses when it is loaded naively, are a table in docs/formats.md.
"""
