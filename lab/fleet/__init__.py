"""Many devices: one head, which holds all that a session is, and workers, which make its runs."""
