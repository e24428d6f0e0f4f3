"""The words of the gateway: what a request, an endpoint and a prompt are, in our own terms.

Plain data and pure functions over it; re-exports nothing.
"""
