"""Keys, DSSE envelopes and TUF trust metadata."""
