"""Grammars of the wire: headers, JSON bytes, streams. Pure functions over bytes; no sockets, no clocks, no logs."""
