"""How structures train the networks: targets, advantages, losses and replay, all on arrays."""
