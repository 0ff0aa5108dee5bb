"""Side-by-side measurements: each returns rows with our figure, the peer's and their ratio, from one run."""
