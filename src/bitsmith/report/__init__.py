"""Tables, plots, one self-contained HTML page: what was asked, what was got, and why they differ."""
