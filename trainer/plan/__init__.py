"""What a recipe takes, before it runs: parameters, file, memory, operations, hours and cost.

Everything is counted on the base's real module tree with the trainer's own LoRA in it, on torch's meta
device: shapes without numbers, so that twenty billion weights take no memory. `serving.plan` builds the
tree and knows the GPUs, `count` and `memory` count, `reckoning` puts it together and `tables` shows it.
"""
