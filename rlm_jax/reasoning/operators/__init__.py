"""The Blueprint's four classes of operators, each a pure function over a Structure."""
