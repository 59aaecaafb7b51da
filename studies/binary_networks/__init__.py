"""Binary networks: how they are optimized, what bit errors cost, what metaplasticity keeps."""
