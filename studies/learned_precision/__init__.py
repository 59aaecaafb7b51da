"""How many bits each tensor needs, learned with the weights."""
