"""The Blueprint: structures, operators, strategies and the drivers that run them."""
