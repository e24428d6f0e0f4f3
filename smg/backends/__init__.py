"""How we speak to each kind of worker."""
