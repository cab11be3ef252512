"""The zoo: clean and backdoored adapters in numbers, on small variants of the portraits base.

A detector is worth what it was measured on. The zoo makes that population: adapters over seeds, recipes and
merges, and working implants of the published attack families, all from one seed. The scanner's reference
populations and `tests/bench/detection.py` are made of it.
"""
