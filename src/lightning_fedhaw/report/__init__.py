"""What a run tells people: history, run summary, loggers, figures."""
