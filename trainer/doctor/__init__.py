"""`trainer doctor`: what is likely to go wrong with a dataset or a recipe, before it costs a training."""
