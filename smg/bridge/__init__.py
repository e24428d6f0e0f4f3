"""Between the gateway and the mesh: the only room, with the command line, that opens `mesh`. Re-exports nothing.

Each file owns one kind of knowledge that nodes share: what it says of ours, and what it does here with what others say.
Nothing in here may delay or fail a request (MSH-7).
"""
