"""Who may use how much: rates, slots and queues. Pure machines; the gateway's gates wait on their behalf."""
