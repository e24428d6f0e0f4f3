"""The mesh library: membership and small replicated state among nodes. Knows nothing of gateways."""
