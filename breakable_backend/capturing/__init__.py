"""``with capture(graph):``, for code that is not compiled."""
