"""The reports of a run.

``history`` collects a run round by round and reads it again; ``run_report`` makes the summary of a finished run,
``run_summary`` fills it from a federation, ``summary`` formats its table; ``start_up`` and ``settings_in_words``
describe what will run; ``round_table`` prints a line a round, with the words of ``metric_names``; ``loggers`` logs;
``plotting``, ``client_pictures`` and ``client_curves`` draw figures.
"""
