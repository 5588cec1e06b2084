"""Problems through a strategy at a budget: solutions, records, figures."""
