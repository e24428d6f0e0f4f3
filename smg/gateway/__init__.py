"""The front of the node: which path does what, who may, and what every answer of our own looks like."""
