"""The page `GET /ui` of the metrics port: what a node does right now, for people.

Every room has a way of its own to be looked at (metrics, `/workers`, `/mesh/status`); this one reads them all and shows them on
one page that updates itself. It needs no key, so nothing secret may be in it. It must never be on the way of a request.
"""
