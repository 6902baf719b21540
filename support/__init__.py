"""What keeps a run safe and a user informed. May be skipped on a first reading: the model would run without it."""
