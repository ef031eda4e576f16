"""Public ops, one family per file; _dispatch decides which implementation runs."""
