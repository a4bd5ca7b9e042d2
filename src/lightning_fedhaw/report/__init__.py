"""The reports of a run.

``history`` collects a run round by round and reads it again; ``run_report`` makes the summary of a finished run,
``run_summary`` fills it and the start-up line from a federation, ``summary`` formats its table; ``loggers`` logs both;
``plotting`` and ``client_pictures`` draw figures.
"""
