"""Sockets on trio: readiness, connections, the HTTP/1.1 server, the client with its pool, TLS."""
