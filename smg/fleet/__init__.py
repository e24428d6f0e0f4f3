"""The fleet: which workers exist, how they are, what they carry. Pure machines, no clocks, no sockets."""
