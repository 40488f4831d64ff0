"""The rented machine: what it is, what it costs, and since when."""
