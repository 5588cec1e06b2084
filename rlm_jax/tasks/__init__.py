"""Problems and how to check them: one file a family of tasks, pure Python."""
