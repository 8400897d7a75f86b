"""What the larger commands beside `search` do; options of all of them, and how they print."""
