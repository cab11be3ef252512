"""Where objects and the index live: protocols in `base`, one vendor a file."""
