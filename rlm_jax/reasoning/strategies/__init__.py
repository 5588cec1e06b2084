"""Strategies: one file each, the same four functions (init, ask, tell, answer)."""
