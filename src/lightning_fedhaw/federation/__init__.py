"""A round: who takes part, what travels, what the server makes of it."""
