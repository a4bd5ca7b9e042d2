"""The round loop and what surrounds it: the only files that use Lightning's protected names."""
