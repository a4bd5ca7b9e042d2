"""The phases of a round, by which its seconds are told apart."""

PHASES = ("broadcast", "local training", "channel", "aggregation", "validation")
