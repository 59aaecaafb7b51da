"""What peers do to the same networks: each as a command in an environment of its own."""
