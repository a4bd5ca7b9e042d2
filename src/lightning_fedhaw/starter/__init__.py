"""A project to start from: the files that ``fedhaw init`` writes, and the command."""
