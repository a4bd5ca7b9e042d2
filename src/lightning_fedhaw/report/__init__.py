"""What a run tells people.

``history`` keeps a run round by round and reads it again; ``run_report`` makes the summary of a finished run,
``summary`` its table; ``loggers`` gives both to the loggers, and ``plotting`` draws figures.
"""
