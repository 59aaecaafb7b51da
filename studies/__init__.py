"""What papers report, run again on small trained networks: one package and one command for each."""
