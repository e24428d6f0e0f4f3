"""What operators see: metrics, logs and traces.

This room owns the names of everything that is counted, the log sink and the trace exporter. It is handed
events by the rooms above and must never decide anything on their behalf, nor open a connection through `smg.net`.
"""
