"""The only files that touch Lightning's protected names: the round loop and what surrounds it."""
