"""What runs beside the requests: probes, load polls, jobs of the worker API, drains. Re-exports nothing.

Each service is one class with `run`, started by the composition root in its nursery; one that fails ends the
process (house rule 38).
"""
