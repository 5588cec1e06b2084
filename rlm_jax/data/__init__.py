"""Problems in and structures out: the tree-record schema and the files that hold it."""
