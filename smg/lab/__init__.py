"""The laboratory: simulated engines and the replay of traces through the real policies, in virtual time."""
